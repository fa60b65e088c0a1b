"""Channels, heads and whole blocks cut out of trained models, chosen in several ways: KL from the dense one.

`python scripts/bench_structured.py`, with more than the embedded base on documentation by `--wiki-data FILE` (the same
base on other text; every tenth piece is held out) and `--story-model DIR --story-data FILE`. A model is cut in memory,
block by block, calibrated on 12 pieces of 256 tokens that the seed chooses and measured on 8 that are held out. Three
seeds; what looks at no text is done once. Channels and heads are chosen by the size of their weights, by what leaving
each out costs (activation), or by what is left of that once the others are fitted (loss); with that fit or without.
Blocks are chosen by their influence on the hidden states, or evenly spread.

Writes benchmarks/results/structured.json row by row, so that an interrupted benchmark goes on where it stopped, then
the tables of docs/pruning.md (`--page` does nothing else).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402
from bench_quantize import EMBEDDED, EVAL, LENGTH, PIECES, Base, found  # noqa: E402

RESULT, PAGE = tables.RESULTS / "structured.json", tables.DOCS / "pruning.md"
SHARES, SEEDS = (0.25, 0.5), (0, 1, 2)
DENSE, SPREAD, INFLUENCE = "dense", "evenly spread", "influence"
WIDTHS: dict[str, dict[str, Any]] = {
    "size": {"choice": "magnitude", "refit": False},
    "activation": {"choice": "activation", "refit": False},
    "size, fitted": {"choice": "magnitude"},
    "loss, fitted": {},
}
"""Ways to cut channels and heads; the last is the default."""
BLIND = ("size", SPREAD)
"""Ways that look at no text."""
WIKI, STORY = f"{EMBEDDED} on WikiText-2", "TinyStories 656k"
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cut: what is asked of the file, and of the model."""

    model: str
    pruner: str
    share: float
    method: str
    seed: int


class Bench(Base):
    """A dense model, the text of its calibration by seed, and what it is compared with."""

    def cut(self, cell: Cell) -> Row | None:
        """Cut a copy and compare it; None where the share takes nothing."""
        from finetune.errors import ConfigError
        from finetune.quant.dense import DenseConfig
        from finetune.quant.driver import Driver
        from finetune.quant.recipe import Recipe
        from finetune.structure import inspect

        twin = copy.deepcopy(self.model)
        if cell.method == DENSE:
            return self.reference.compare(twin) | {"parameters": parameters(twin)}
        if cell.method == SPREAD:
            return self.spread(cell.share)
        pruner = pruner_of(cell)
        try:
            pruner.plan(self.build(twin.config), self.build)
        except ConfigError:
            return None
        batches = self._batches(cell.seed)
        Driver(twin, inspect(twin), Recipe(DenseConfig(), cut=pruner), batches).go()
        parts = [part for part in pruner.summary.parts if "error" in part]
        error = {"layer_error": statistics.fmean(part["error"] for part in parts)} if parts else {}
        return self.reference.compare(twin) | {"parameters": parameters(twin)} | error

    def spread(self, share: float) -> Row | None:
        """The model without some blocks, evenly spread between the first and the last."""
        from finetune.offsite.cut import spread, without
        from finetune.structure import inspect

        blocks = inspect(self.model).blocks
        gone = int(len(blocks) * share + 1e-6)
        if not gone:
            return None
        stay = spread(len(blocks), len(blocks) - gone)
        dropped = [name for number, name in enumerate(blocks) if number not in stay]
        less = sum(p.numel() for name in dropped for p in self.model.get_submodule(name).parameters())
        with without(self.model, dropped):
            return self.reference.compare(self.model) | {"parameters": parameters(self.model) - less}

    def build(self, config: Any) -> Any:
        """The model of a configuration, on the meta device."""
        from finetune.model.config import ModelConfig
        from finetune.model.pretrained import empty_model

        return empty_model(config, ModelConfig(path="embedded"))


def pruner_of(cell: Cell) -> Any:
    """What cuts."""
    from finetune.quant.pruners.base import PRUNERS

    kind: Any = PRUNERS.type_of(cell.pruner)
    further = {"multiple_of": 16} if cell.pruner == "channels" else {}  # 3/4 of the embedded base's 448 is 21 of these
    return PRUNERS.build(kind(sparsity=cell.share, **further, **WIDTHS.get(cell.method, {})))


def parameters(model: Any) -> int:
    """Weights of a model, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def cells(model: str) -> Iterator[Cell]:
    """All that is done with a model."""
    yield Cell(model, "none", 0.0, DENSE, 0)
    for seed in SEEDS:
        for share in SHARES:
            for pruner in ("channels", "heads", "layers"):
                methods = (SPREAD, INFLUENCE) if pruner == "layers" else tuple(WIDTHS)
                yield from (
                    Cell(model, pruner, share, method, seed) for method in methods if not seed or method not in BLIND
                )


def measure(name: str, opened: Callable[[], Bench]) -> None:
    """Fill in the missing rows of a model."""
    todo = [cell for cell in cells(name) if not found(tables.read(RESULT), **vars(cell))]
    bench = opened() if todo else None
    for cell in todo:
        assert bench is not None
        figures = bench.cut(cell)
        if figures is None:
            continue
        row = vars(cell) | figures
        print(f"{name}, {cell.pruner}, {cell.share}, {cell.method}, {cell.seed}: KL {row['kl_mean']:.5f}", flush=True)
        rows = [*tables.read(RESULT), row]
        tables.write(RESULT, pieces=PIECES, length=LENGTH, eval_pieces=EVAL, rows=rows)


def made(rows: list[Row]) -> str:
    """The tables of the page."""
    return "\n\n".join(table(rows, model) for model in dict.fromkeys(row["model"] for row in rows))


def table(rows: list[Row], model: str) -> str:
    """KL and perplexity of a model, means over seeds."""
    (dense,) = found(rows, model=model, method=DENSE)
    title = f"{model[0].upper()}{model[1:]}: {dense['parameters'] / 1e6:.2f} M parameters"
    lines = [f"{title}, perplexity {dense['perplexity']:.2f} over {dense['tokens']} tokens."]
    for pruners, methods in ((("channels", "heads"), tuple(WIDTHS)), (("layers",), (SPREAD, INFLUENCE))):
        body = []
        for pruner in pruners:
            for share in SHARES:
                alike = found(rows, model=model, pruner=pruner, share=share)
                if alike:
                    size = f"{alike[0]['parameters'] / 1e6:.2f} M"
                    entries = " | ".join(_entry(found(alike, method=method)) for method in methods)
                    body.append(f"| `{pruner}` {share:.0%} | {size} | {entries} |")
        if body:
            head = "| cut | left | " + " | ".join(methods) + " |"
            lines += ["", head, "| --- | --- |" + " --- |" * len(methods), *body]
    return "\n".join(lines)


def _entry(rows: list[Row]) -> str:
    """Mean KL, and mean perplexity."""
    if not rows:
        return "-"
    kl, perplexity = (statistics.fmean(row[key] for row in rows) for key in ("kl_mean", "perplexity"))
    return f"{kl:.3f} ({perplexity:.2f})"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--wiki-data", help="WikiText-2 in rows (JSONL), for the embedded base once more")
    arguments.add_argument("--story-model", help="a directory with a second dense model")
    arguments.add_argument("--story-data", help="text for it")
    arguments.add_argument("--page", action="store_true", help="only make the tables anew")
    told = arguments.parse_args()
    if not told.page:
        measure(EMBEDDED, lambda: Bench("embedded", "pydocs", "pydocs"))
        if told.story_model:
            measure(STORY, lambda: Bench(told.story_model, told.story_data, None))
        if told.wiki_data:
            measure(WIKI, lambda: Bench("embedded", told.wiki_data, None))
    tables.put(PAGE, "bench_structured", made(tables.read(RESULT)))


if __name__ == "__main__":
    main()

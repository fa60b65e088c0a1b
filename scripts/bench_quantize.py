"""RTN, GPTQ and AWQ at 4, 3 and 2 bits: perplexity, and KL from the dense model.

`python scripts/bench_quantize.py`, with another base beside the embedded one by `--story-model DIR --story-data FILE`
(rows of text; every tenth piece is held out). Rows and groups of 128, 64 and 32, asymmetric with integer zero points;
a model is quantized in memory, calibrated on 12 pieces of 256 tokens that the seed chooses, and measured on 8 that
are held out (of the embedded base: documentation that it never saw). Three seeds; rounding to nearest looks at no text
and is done once. Where a group does not divide a width, the last one is short. Groups of 128 of the embedded base are
also tried with halves of methods, and with scales fitted on the way.

Writes benchmarks/results/quantize.json row by row, so that an interrupted benchmark goes on where it stopped, then the
tables of docs/quantization.md (`--page` does nothing else), and says where GPTQ is not below rounding to nearest in KL.
Ranks by KL: at this size perplexities differ by noise.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402

RESULT, PAGE = tables.RESULTS / "quantize.json", tables.DOCS / "quantization.md"
BITS, GROUPS, SEEDS = (4, 3, 2), (-1, 128, 64, 32), (0, 1, 2)
PIECES, EVAL, LENGTH = 12, 8, 256
EMBEDDED = "embedded base"
RTN, DENSE = "RTN", "dense"
"""Methods that look at no text."""
MAIN = (RTN, "GPTQ", "GPTQ act-order", "AWQ")
"""The last but one is `calibrator=gptq` as it stands, the one before it has `calibrator.act_order=false`."""
ASIDE = ("GPTQ, groups on the way", "GPTQ act-order, groups on the way")
PARTS = ("AWQ, no ranges searched", "AWQ, then GPTQ act-order")
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One quantization: what is asked of the file, and of the model."""

    model: str
    method: str
    bits: int
    group_size: int
    seed: int

    def key(self) -> Row:
        """Of its row."""
        return vars(self)


def cells(model: str) -> Iterator[Cell]:
    """All that is done with a model, seed after seed."""
    yield Cell(model, DENSE, 0, 0, 0)
    for seed in SEEDS:
        for bits in BITS:
            for size in GROUPS:
                yield from (Cell(model, method, bits, size, seed) for method in MAIN if method != RTN or not seed)
        for bits in BITS if model == EMBEDDED else ():
            yield from (Cell(model, method, bits, 128, seed) for method in PARTS)
            yield from (Cell(model, method, bits, size, seed) for size in GROUPS[1:] for method in ASIDE)


class Base:
    """A dense model, the text of its calibration by seed, and what it is compared with."""

    def __init__(self, path: str, calibration: str, held_out: str | None) -> None:
        import finetune as ft
        from finetune.model.config import ModelConfig
        from finetune.quant.affine import Int4Config
        from finetune.quant.dense import DenseConfig
        from finetune.quantize.config import CalibrationConfig
        from finetune.quantize.measure import Reference
        from finetune.quantize.text import read_text

        config = ModelConfig(path=path, fused="off")
        self.model, tokenizer = ft.load(config, DenseConfig(), dtype="fp32", device="cpu")
        told = CalibrationConfig(calibration=calibration, eval=held_out, samples=1 << 30, max_length=LENGTH)
        text = read_text(told, tokenizer, len(tokenizer), LENGTH, Int4Config())
        self.pieces = [piece for piece in text.calibration if len(piece) == LENGTH]
        self.reference = Reference(self.model, text.eval[:EVAL])

    def figures(self, cell: Cell) -> Row:
        """Quantize a copy and compare it."""
        from finetune.quant.affine import Int2Config, Int3Config, Int4Config
        from finetune.quant.driver import Driver
        from finetune.quant.recipe import Recipe
        from finetune.structure import inspect

        twin = copy.deepcopy(self.model)
        if cell.method != DENSE:
            kinds: dict[int, Any] = {4: Int4Config, 3: Int3Config, 2: Int2Config}
            rounder, transform = method(cell.method)
            batches = [] if cell.method == RTN else self._batches(cell.seed)
            quant = kinds[cell.bits](group_size=cell.group_size)
            Driver(twin, inspect(twin), Recipe(quant, rounder, transform=transform), batches).go()
        return self.reference.compare(twin)

    def _batches(self, seed: int) -> list[dict[str, Any]]:
        import torch

        from finetune.quantize.text import batches_of

        order = torch.randperm(len(self.pieces), generator=torch.Generator().manual_seed(seed))
        return batches_of([self.pieces[number] for number in order[:PIECES].tolist()], 2 * LENGTH)


def method(name: str) -> tuple[Any, Any]:
    """The rounder and the transform that a method is."""
    from finetune.quant.rounders.gptq import GPTQ, GPTQConfig
    from finetune.quant.rounders.rtn import RTN as ToNearest
    from finetune.quant.transforms.awq import AWQ, AWQConfig

    made: dict[str, Callable[[], tuple[Any, Any]]] = {
        RTN: lambda: (ToNearest(), None),
        "GPTQ": lambda: (GPTQ(GPTQConfig(act_order=False)), None),
        "GPTQ act-order": lambda: (GPTQ(), None),
        "AWQ": lambda: (ToNearest(), AWQ()),
        ASIDE[0]: lambda: (GPTQ(GPTQConfig(act_order=False, static_groups=False)), None),
        ASIDE[1]: lambda: (GPTQ(GPTQConfig(static_groups=False)), None),
        PARTS[0]: lambda: (ToNearest(), AWQ(AWQConfig(clip=False))),
        PARTS[1]: lambda: (GPTQ(), AWQ()),
    }
    return made[name]()


def measure(name: str, opened: Callable[[], Base]) -> None:
    """Fill in the missing rows of a model; another process may do so with another model meanwhile."""
    todo = [cell for cell in cells(name) if not found(tables.read(RESULT), **cell.key())]
    base = opened() if todo else None
    for cell in todo:
        assert base is not None
        begun = time.process_time()
        figures = base.figures(cell)
        row = cell.key() | figures | {"cpu_seconds": round(time.process_time() - begun, 2)}
        print(f"{name}, {cell.method}, {cell.bits} bits, {cell.group_size}, {cell.seed}: KL {row['kl_mean']:.5f}")
        sys.stdout.flush()
        facts = {"pieces": PIECES, "length": LENGTH, "eval_pieces": EVAL}
        tables.write(RESULT, format_version=2, **facts, rows=[*tables.read(RESULT), row])


def found(rows: list[Row], **key: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in key.items())]


def exceptions(rows: list[Row]) -> tuple[list[str], int]:
    """Where GPTQ, of one seed, is not below rounding to nearest in KL; and of how many."""
    wrong, count = [], 0
    for row in rows:
        if not row["method"].startswith("GPTQ"):
            continue
        same = {key: row[key] for key in ("model", "bits", "group_size")}
        for nearest in found(rows, method=RTN, **same):
            count += 1
            if row["kl_mean"] >= nearest["kl_mean"]:
                wrong.append(f"{row['model']}, {row['method']}, {row['bits']} bits, {row['group_size']}")
    return wrong, count


def made(rows: list[Row]) -> str:
    """The tables of the page."""
    parts = [table(rows, model) for model in sorted({row["model"] for row in rows}, key=lambda name: name != EMBEDDED)]
    wrong, count = exceptions(rows)
    below = f"GPTQ is below rounding to nearest in KL in {count - len(wrong)} of {count} runs"
    parts.append(below + (f"; not in: {'; '.join(wrong)}." if wrong else "."))
    return "\n\n".join([*parts, aside(rows)])


def table(rows: list[Row], model: str) -> str:
    """KL and perplexity of a model, means over seeds."""
    mine = found(rows, model=model)
    dense = [row["perplexity"] for row in found(mine, method=DENSE)]
    lines = ["| bits | group | " + " | ".join(MAIN) + " |", "| --- | --- |" + " --- |" * len(MAIN)]
    seeds = usual_seeds(found(mine, method=MAIN[1]))
    for bits in BITS:
        for size in GROUPS:
            shown = [cell_of(found(mine, method=name, bits=bits, group_size=size), seeds) for name in MAIN]
            lines.append(f"| {bits} | {'row' if size < 0 else size} | " + " | ".join(shown) + " |")
    told = f"perplexity {dense[0]:.2f} dense" if dense else "dense perplexity missing"
    tokens = max(row["tokens"] for row in mine)
    return f"The {model}, {told}, {tokens} tokens, {of_seeds(seeds)}:\n\n" + "\n".join(lines)


def usual_seeds(rows: list[Row]) -> int:
    """How many seeds there are of most cells."""
    counts = Counter((row["method"], row["bits"], row["group_size"]) for row in rows)
    return statistics.mode(counts.values()) if counts else 0


def of_seeds(count: int) -> str:
    """So many of those that are wanted."""
    return f"means of {count} seeds" if count == len(SEEDS) else f"{count} of {len(SEEDS)} seeds"


def cell_of(rows: list[Row], seeds: int) -> str:
    """The mean of some seeds, KL (perplexity).

    Args:
        seeds: how many the table has.
    """
    if not rows:
        return "missing"
    few = "" if rows[0]["method"] == RTN or len(rows) == seeds else f", {of_seeds(len(rows))}"
    kl, perplexity = (statistics.fmean(row[key] for row in rows) for key in ("kl_mean", "perplexity"))
    return f"{kl:.4f} ({perplexity:.2f}{few})"


def aside(rows: list[Row]) -> str:
    """What was tried on the embedded base alone: KL, means over seeds."""
    names = ("GPTQ", ASIDE[0], "GPTQ act-order", ASIDE[1], "AWQ", *PARTS)
    head = [(bits, size) for bits in BITS for size in GROUPS[1:]]
    lines = ["| KL | " + " | ".join(f"{bits} bits, {size}" for bits, size in head) + " |"]
    lines.append("| --- |" + " --- |" * len(head))
    mine = [row for row in found(rows, model=EMBEDDED) if row["method"] in names]
    seeds = usual_seeds(mine)
    for name in names:
        shown = []
        for bits, size in head:
            same = found(mine, method=name, bits=bits, group_size=size)
            asked = name not in PARTS or size == GROUPS[1]
            few = "" if len(same) == seeds else f" ({of_seeds(len(same))})"
            shown.append(f"{statistics.fmean(r['kl_mean'] for r in same):.4f}{few}" if same else "missing" * asked)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return f"More of the {EMBEDDED}, {of_seeds(seeds)}:\n\n" + "\n".join(lines)


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--story-model", help="a second base: directory of a small pretrained model")
    parser.add_argument("--story-data", help="its rows of text")
    parser.add_argument("--only", help="one of the models, by the name in the file; the other is for another process")
    parser.add_argument("--page", action="store_true", help="write the tables of what is there, and measure nothing")
    options = parser.parse_args()
    bases: dict[str, Callable[[], Base]] = {EMBEDDED: lambda: Base("embedded", "pydocs", "pydocs")}
    if options.story_model and options.story_data:
        bases[Path(options.story_model).name] = lambda: Base(options.story_model, options.story_data, None)
    for name, opened in bases.items():
        if not options.page and options.only in (None, name):
            measure(name, opened)
    rows = tables.read(RESULT)
    wrong, count = exceptions(rows)
    print(f"GPTQ is below RTN in KL in {count - len(wrong)} of {count} runs", *wrong, sep="\n")
    tables.put(PAGE, "bench_quantize", made(rows))


if __name__ == "__main__":
    main()

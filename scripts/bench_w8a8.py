"""W8A8 on the embedded base with outliers put into it: what rounding inputs costs, with and without smoothing.

`python scripts/bench_w8a8.py`: in each block a few channels of every norm are made 1, 30 or 100 times as large and what
reads them that much smaller, which changes nothing of what the dense model computes (the largest change of a logit is
written down). Then it is quantized in memory: LLM.int8(), W8A8 by channel and token, SmoothQuant's O1, O2 and O3
(arXiv:2211.10438, table 2) without (naive) and with smoothing, and static ranges as Outlier Suppression has them
(arXiv:2209.13325): after gamma migration, by token-wise clipping, and both, in 8 and in 6 bits. Calibrated on the
training half of the standard library's documentation, measured on the half that the base never saw. Such outliers are
the exact inverse of smoothing, so that it recovers them by construction: this shows that inputs round as they should,
not how well smoothing does elsewhere (scripts/bench_outlier_seeded.py does that).

Writes benchmarks/results/w8a8.json and the table of docs/quantization.md; rows already in the file are kept, so an
interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402

RESULT, PAGE = tables.RESULTS / "w8a8.json", tables.DOCS / "quantization.md"
GAINS = (1, 30, 100)
CHANNELS = 3
PIECES, EVAL, LENGTH = 4, 4, 256
TENSOR = {"weights": "tensor", "activations": "tensor"}
SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8 channel, token": {},
    "W8A8 O1 (tensor, token)": {"weights": "tensor"},
    "W8A8 O2 (tensor, tensor)": TENSOR,
    "W8A8 O3 (tensor, static)": TENSOR | {"static": True},
}
STATIC: dict[str, dict[str, Any]] = {
    "w8a8": TENSOR | {"static": True},
    "w6a6": {"activations": "tensor", "static": True},
}
"""Of Outlier Suppression's rows, by format."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gains", type=int, nargs="+", choices=GAINS, default=GAINS, help="of this run")
    asked = arguments.parse_args().gains
    import torch

    import finetune as ft
    from finetune.model.config import ModelConfig
    from finetune.quant.dense import DenseConfig
    from finetune.quant.driver import Driver
    from finetune.quant.int8_storage import Int8Config
    from finetune.quant.recipe import Recipe
    from finetune.quant.transforms.gamma import Gamma
    from finetune.quant.transforms.smoothquant import SmoothQuant
    from finetune.quant.w8a8 import W6A6Config, W8A8Config
    from finetune.quantize.config import CalibrationConfig
    from finetune.quantize.measure import Reference
    from finetune.quantize.text import batches_of, read_text
    from finetune.structure import inspect

    base = ModelConfig(path="embedded", fused="off")
    model, tokenizer = ft.load(base, DenseConfig(), dtype="fp32", device="cpu")
    config = CalibrationConfig(calibration="pydocs", eval="pydocs", samples=PIECES, max_length=LENGTH)
    text = read_text(config, tokenizer, len(tokenizer), LENGTH, W8A8Config())
    reference, batches = Reference(model, text.eval[:EVAL]), batches_of(text.calibration)
    methods: dict[str, tuple[Any, Any]] = {
        "LLM.int8()": (Int8Config(), None),
        "LLM.int8(), keep_columns=null": (Int8Config(keep_columns=None), None),
        "LLM.int8(), smoothed": (Int8Config(), SmoothQuant),
    }
    for ending, transform in (("", None), (", smoothed", SmoothQuant)):
        for name, settings in SETTINGS.items():
            methods[name + ending] = (W8A8Config(**settings), transform)
    for ending, transform in (("", None), (", gamma", Gamma)):
        for clip in ("none", "token_wise"):
            ends = ending + (", token-wise" if clip != "none" else "")
            if ends:  # without either it is O3
                methods[f"W8A8 O3{ends}"] = (W8A8Config(**STATIC["w8a8"], clip=clip), transform)
            methods[f"W6A6 (channel, static){ends}"] = (W6A6Config(**STATIC["w6a6"], clip=clip), transform)
    order = [(gain, name) for gain in reversed(GAINS) for name in methods]
    for gain in sorted(asked, reverse=True):
        injected = copy.deepcopy(model)
        if gain > 1:
            inject(injected, gain, batches[0])
        with torch.no_grad():
            change = float((injected(**batches[0]).logits - model(**batches[0]).logits).abs().max())
        for name, (quant, transform) in methods.items():
            if any((row["gain"], row["method"]) == (gain, name) for row in tables.read(RESULT)):
                continue
            twin = copy.deepcopy(injected)
            seen = batches if transform or quant.needs_inputs else []
            Driver(twin, inspect(twin), Recipe(quant, transform=transform() if transform else None), seen).go()
            row = {"gain": gain, "method": name, "logit_change": change, **reference.compare(twin)}
            rows = sorted([*tables.read(RESULT), row], key=lambda each: order.index((each["gain"], each["method"])))
            print(f"x{gain:<3} {name:<36} perplexity {row['perplexity']:.3f} KL {row['kl_mean']:.5f}", flush=True)
            facts = {"pieces": PIECES, "length": LENGTH, "channels": CHANNELS, "eval_tokens": row["tokens"]}
            tables.write(RESULT, **facts, rows=rows)
    if len(rows := tables.read(RESULT)) == len(order):
        tables.put(PAGE, "bench_w8a8", made(rows))


def inject(model: Any, gain: float, batch: dict[str, Any]) -> None:
    """Make some channels of every norm larger, and what reads them smaller."""
    import torch

    from finetune.quant.transforms.fold import fold
    from finetune.quant.transforms.search import Search
    from finetune.structure import inspect

    structure, ids = inspect(model), batch["input_ids"][:1, :32]
    search = Search(model, structure)
    generator = torch.Generator().manual_seed(0)
    for block in structure.blocks:
        for scaling in search.scalings(block, lambda: model(input_ids=ids, use_cache=False)):
            if scaling.is_norm:
                by_I = torch.ones(len(scaling.rows_I))
                by_I[torch.randperm(len(by_I), generator=generator)[:CHANNELS]] = 1 / gain
                fold(model, scaling, by_I)


def made(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    found = {(row["gain"], row["method"]): row for row in rows}
    columns = [f"{'as trained' if gain == 1 else f'x{gain}'}" for gain in GAINS]
    dense = rows[0]["perplexity_dense"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| perplexity (KL) | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(GAINS)]
    lines.append(f"| dense | {' | '.join([f'{dense:.2f}'] * len(GAINS))} |")
    for method in methods:
        cells = [found[gain, method] for gain in GAINS]
        lines.append(
            f"| {method} | " + " | ".join(f"{shown(c['perplexity'])} ({c['kl_mean']:.4f})" for c in cells) + " |"
        )
    return "\n".join(lines)


def shown(perplexity: float) -> str:
    """A perplexity for people; where nothing is left of a model, its order of magnitude."""
    return f"{perplexity:.2f}" if perplexity < 1e5 else f"{perplexity:.0e}"


if __name__ == "__main__":
    main()

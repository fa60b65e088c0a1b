"""W8A8 on the embedded base with outliers put into it: what rounding inputs costs, with and without smoothing.

`python scripts/bench_w8a8.py`: in each block a few channels of every norm are made 1, 30 or 100 times as large and what
reads them that much smaller, which changes nothing of what the dense model computes (the largest change of a logit is
written down). Then it is quantized in memory: LLM.int8(), W8A8 by channel and token, and SmoothQuant's O1, O2 and O3
(arXiv:2211.10438, table 2) without (naive) and with smoothing. Calibrated on the training half of the standard
library's documentation, measured on the half that the base never saw. Such outliers are the exact inverse of smoothing,
so that it recovers them by construction: this shows that inputs round as they should, not how well smoothing does
elsewhere.

Writes benchmarks/results/w8a8.json and the table of docs/quantization.md; rows already in the file are kept, so an
interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from machine import describe_machine  # noqa: E402

RESULT, PAGE = ROOT / "benchmarks" / "results" / "w8a8.json", ROOT / "docs" / "quantization.md"
START, END = "<!-- made by scripts/bench_w8a8.py -->", "<!-- end of scripts/bench_w8a8.py -->"
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import torch

    import finetune as ft
    from finetune.model.config import ModelConfig
    from finetune.quant.dense import DenseConfig
    from finetune.quant.driver import Driver
    from finetune.quant.int8_storage import Int8Config
    from finetune.quant.rounders.rtn import RTN
    from finetune.quant.transforms.smoothquant import SmoothQuant
    from finetune.quant.w8a8 import W8A8Config
    from finetune.quantize.config import CalibrationConfig
    from finetune.quantize.measure import Reference
    from finetune.quantize.text import batches_of, read_text
    from finetune.structure import inspect

    base = ModelConfig(path="embedded", fused="off")
    model, tokenizer = ft.load(base, DenseConfig(), dtype="fp32", device="cpu")
    config = CalibrationConfig(calibration="pydocs", eval="pydocs", samples=PIECES, max_length=LENGTH)
    text = read_text(config, tokenizer, len(tokenizer), LENGTH, W8A8Config())
    reference, batches = Reference(model, text.eval[:EVAL]), batches_of(text.calibration)
    methods: dict[str, tuple[Any, bool]] = {"LLM.int8()": (Int8Config(), False)}
    for smooth in (False, True):
        for name, settings in SETTINGS.items():
            methods[f"{name}{', smoothed' if smooth else ''}"] = (W8A8Config(**settings), smooth)
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text("utf-8"))["rows"] if RESULT.is_file() else []
    done = {(row["gain"], row["method"]) for row in rows}
    for gain in reversed(GAINS):
        injected = copy.deepcopy(model)
        if gain > 1:
            inject(injected, gain, batches[0])
        with torch.no_grad():
            change = float((injected(**batches[0]).logits - model(**batches[0]).logits).abs().max())
        for name, (quant, smooth) in methods.items():
            if (gain, name) in done:
                continue
            twin = copy.deepcopy(injected)
            transform = SmoothQuant() if smooth else None
            seen = batches if smooth or quant.needs_inputs else []
            Driver(twin, inspect(twin), quant, RTN(), seen, transform=transform).go()
            row = {"gain": gain, "method": name, "logit_change": change, **reference.compare(twin)}
            rows.append(row)
            print(f"x{gain:<3} {name:<36} perplexity {row['perplexity']:.3f} KL {row['kl_mean']:.5f}", flush=True)
            facts = {"pieces": PIECES, "length": LENGTH, "channels": CHANNELS, "eval_tokens": row["tokens"]}
            document = {"format_version": 1, "machine": describe_machine(), **facts, "rows": rows}
            RESULT.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    write_page(rows)


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


def write_page(rows: list[dict[str, Any]]) -> None:
    """Put the table in the page, between its marks."""
    found = {(row["gain"], row["method"]): row for row in rows}
    columns = [f"{'as trained' if gain == 1 else f'x{gain}'}" for gain in GAINS]
    dense = rows[0]["perplexity_dense"]
    methods = [row["method"] for row in rows if row["gain"] == GAINS[-1]]
    lines = ["| perplexity (KL) | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(GAINS)]
    lines.append(f"| dense | {' | '.join([f'{dense:.2f}'] * len(GAINS))} |")
    for method in methods:
        cells = [found[gain, method] for gain in GAINS]
        lines.append(f"| {method} | " + " | ".join(f"{c['perplexity']:.2f} ({c['kl_mean']:.4f})" for c in cells) + " |")
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(START)
    if rest:
        PAGE.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()

"""Magnitude, Wanda and SparseGPT on the embedded base: KL from the dense model at 50 % and at 2:4, dense and in int4.

`python scripts/bench_pruning.py`: the model is pruned in memory, block by block, calibrated on the training half of the
standard library's documentation and measured on the half that the base never saw; what stays is left dense, or stored
as int4 in groups of 64 (codes by GPTQ, and by SparseGPT's own sweep). Writes benchmarks/results/pruning.json and the
table of docs/pruning.md; rows already in the file are kept.
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

RESULT, PAGE = ROOT / "benchmarks" / "results" / "pruning.json", ROOT / "docs" / "pruning.md"
START, END = "<!-- made by scripts/bench_pruning.py -->", "<!-- end -->"
METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = (None, "2:4", "4:8")
STORED = ("none", "int4")
PIECES, EVAL, LENGTH = 24, 12, 256


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.parse_args()
    import finetune as ft
    from finetune.model.config import ModelConfig
    from finetune.quant.affine import Int4Config
    from finetune.quant.dense import DenseConfig
    from finetune.quant.driver import Driver
    from finetune.quant.pruners.base import PRUNERS
    from finetune.quant.rounders.gptq import GPTQ
    from finetune.quantize.config import CalibrationConfig
    from finetune.quantize.measure import Reference
    from finetune.quantize.pruning import sparsity
    from finetune.quantize.text import batches_of, read_text
    from finetune.structure import inspect

    base = ModelConfig(path="embedded", fused="off")
    model, tokenizer = ft.load(base, DenseConfig(), dtype="fp32", device="cpu")
    config = CalibrationConfig(calibration="pydocs", eval="pydocs", samples=PIECES, max_length=LENGTH)
    text = read_text(config, tokenizer, len(tokenizer), LENGTH, Int4Config())
    reference, batches = Reference(model, text.eval[:EVAL]), batches_of(text.calibration)
    kinds: dict[str, Any] = PRUNERS.types()
    storage: dict[str, Any] = {"none": DenseConfig(), "int4": Int4Config()}
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text("utf-8"))["rows"] if RESULT.is_file() else []
    done = {(row["quant"], row["pattern"], row["pruner"]) for row in rows}
    cells = [(quant, pattern, name) for quant in STORED for pattern in PATTERNS for name in METHODS]
    for quant, pattern, name in cells:
        if (quant, pattern, name) in done:
            continue
        twin, pruner = copy.deepcopy(model), PRUNERS.build(kinds[name](pattern=pattern))
        structure = inspect(twin)
        layers = Driver(twin, structure, storage[quant], GPTQ(), batches, pruner=pruner).go()
        error = sum(layer.error for layer in layers) / len(layers)
        reached = sparsity(layers, structure)
        row = {"quant": quant, "pattern": pattern, "pruner": name, "sparsity": reached, "mean_layer_error": error}
        rows.append(row | reference.compare(twin))
        print(f"{quant:<5} {pattern or '50 %':<5} {name:<10} KL {rows[-1]['kl_mean']:.5f}", flush=True)
        facts = {"pieces": PIECES, "length": LENGTH, "eval_tokens": rows[-1]["tokens"]}
        document = {"format_version": 1, "machine": describe_machine(), **facts, "rows": rows}
        RESULT.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    write_page(rows)


def write_page(rows: list[dict[str, Any]]) -> None:
    """Put the table in the page, between its marks."""
    found = {(row["quant"], row["pattern"], row["pruner"]): row for row in rows}
    lines = ["| stored | zeros | " + " | ".join(METHODS) + " |", "| --- | --- |" + " --- |" * len(METHODS)]
    for quant in STORED:
        for pattern in PATTERNS:
            cells = [f"{found[quant, pattern, name]['kl_mean']:.3f}" for name in METHODS]
            lines.append(
                f"| {'dense' if quant == 'none' else quant} | {pattern or '50 %'} | " + " | ".join(cells) + " |"
            )
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(START)
    PAGE.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()

"""RTN against GPTQ, and AWQ where asked for, on the embedded base: KL from the dense model.

`python scripts/bench_quantize.py`: for 4, 3 and 2 bits, rows and groups of 128, 64 and 32, asymmetric with integer zero
points, the model is quantized in memory by rounding to nearest and by GPTQ (act-order), both on the same grids;
calibrated on the training half of the standard library's documentation, measured on the half that the base
never saw. Writes benchmarks/results/quantize.json and the table of docs/quantization.md; rows already in the file are
kept, so an interrupted benchmark goes on where it stopped. `--awq` adds
AWQ with rounding to nearest. Ranks by KL: at this size perplexities differ by noise.
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

RESULT, PAGE = ROOT / "benchmarks" / "results" / "quantize.json", ROOT / "docs" / "quantization.md"
START, END = "<!-- made by scripts/bench_quantize.py -->", "<!-- end -->"
BITS, GROUPS = (4, 3, 2), (-1, 128, 64, 32)
ROUNDERS = ("RTN", "GPTQ")
PIECES, EVAL, LENGTH = 24, 12, 256


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--awq", action="store_true", help="AWQ with rounding to nearest as well")
    wants_awq = arguments.parse_args().awq
    import finetune as ft
    from finetune.model.config import ModelConfig
    from finetune.quant.affine import Int2Config, Int3Config, Int4Config
    from finetune.quant.dense import DenseConfig
    from finetune.quant.driver import Driver
    from finetune.quant.rounders.gptq import GPTQ
    from finetune.quant.rounders.rtn import RTN
    from finetune.quant.transforms.awq import AWQ
    from finetune.quantize.config import CalibrationConfig
    from finetune.quantize.measure import Reference
    from finetune.quantize.text import batches_of, read_text
    from finetune.structure import inspect

    rounders = {"RTN": RTN(), "GPTQ": GPTQ()} | ({"AWQ": RTN()} if wants_awq else {})
    kinds: dict[int, Any] = {4: Int4Config, 3: Int3Config, 2: Int2Config}
    base = ModelConfig(path="embedded", fused="off")
    model, tokenizer = ft.load(base, DenseConfig(), dtype="fp32", device="cpu")
    config = CalibrationConfig(calibration="pydocs", eval="pydocs", samples=PIECES, max_length=LENGTH)
    text = read_text(config, tokenizer, len(tokenizer), LENGTH, Int4Config())
    reference, batches = Reference(model, text.eval[:EVAL]), batches_of(text.calibration)
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text("utf-8"))["rows"] if RESULT.is_file() else []
    done = {(row["bits"], row["group_size"], row["rounder"]) for row in rows}
    for bits in BITS:
        for size in GROUPS:
            for name, rounder in rounders.items():
                if (bits, size, name) in done:
                    continue
                twin = copy.deepcopy(model)
                seen = [] if name == "RTN" else batches
                transform = AWQ() if name == "AWQ" else None
                Driver(twin, inspect(twin), kinds[bits](group_size=size), rounder, seen, transform=transform).go()
                row = {"bits": bits, "group_size": size, "rounder": name, **reference.compare(twin)}
                rows.append(row)
                print(f"int{bits} group {size:>3} {name:<5} KL {row['kl_mean']:.5f}", flush=True)
                facts = {"pieces": PIECES, "length": LENGTH, "eval_tokens": row["tokens"]}
                document = {"format_version": 1, "machine": describe_machine(), **facts, "rows": rows}
                RESULT.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    write_page(rows)


def write_page(rows: list[dict[str, Any]]) -> None:
    """Put the table in the page, between its marks."""
    found = {(row["bits"], row["group_size"], row["rounder"]): row for row in rows}
    names = [name for name in (*ROUNDERS, "AWQ") if any(row["rounder"] == name for row in rows)]
    lines = ["| bits | group | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names)]
    for bits in BITS:
        for size in GROUPS:
            cells = [f"{found[at]['kl_mean']:.4f}" if (at := (bits, size, name)) in found else "-" for name in names]
            lines.append(f"| {bits} | {'row' if size < 0 else size} | " + " | ".join(cells) + " |")
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(START)
    PAGE.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()

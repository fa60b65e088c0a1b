"""How far rounding moves the weights of the embedded base, by storage format: `python scripts/bench_errors.py`.

|q(w) - w| / |w| over all projections, each format at its defaults, and the integer ones with every zero point. Takes
seconds; the same on any machine. Results: benchmarks/results/weight_errors.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]
from machine import describe_machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "weight_errors.json"
GRIDS: tuple[dict[str, Any], ...] = (
    {"symmetric": True},
    {"symmetric": False, "zero_point": "integer"},
    {"symmetric": False, "zero_point": "real"},
)
FORMATS: dict[str, tuple[dict[str, Any], ...]] = {
    "int8": ({},),
    "nf4": ({},),
    "fp4": ({},),
    **{name: GRIDS for name in ("int8g", "int4", "int3", "int2")},
    "q4_0": tuple({"outliers": outliers} for outliers in (0, 1, 2, 4)),
    **{name: ({},) for name in ("q4_1", "q5_0", "q5_1", "q8_0")},
}


def errors() -> list[dict[str, Any]]:
    """A row for each format and setting."""
    import torch

    import finetune as ft
    from finetune.quant.base import QUANTIZERS
    from finetune.structure import inspect

    model, _ = ft.load("embedded", quant=QUANTIZERS.type_of("none")(), dtype="fp32")
    weights = [model.get_submodule(p.name).dequantize(torch.float32) for p in inspect(model).projections]
    norm = sum(float(w.double().square().sum()) for w in weights)
    rows = []
    for name, settings in ((name, settings) for name, several in FORMATS.items() for settings in several):
        moved = 0.0
        for w_OI in weights:
            frozen = QUANTIZERS.build(
                QUANTIZERS.type_of(name)(**settings), *w_OI.shape, bias=False, dtype=torch.float32, device="cpu"
            )
            frozen.store(w_OI)
            moved += float((frozen.dequantize(torch.float32) - w_OI).double().square().sum())
        rows.append({"format": name, **settings, "relative_error": float(f"{(moved / norm) ** 0.5:.4g}")})
    return rows


def main() -> None:
    """Measure and write."""
    rows = errors()
    for row in rows:
        print(json.dumps(row))
    RESULTS.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

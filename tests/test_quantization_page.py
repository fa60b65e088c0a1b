"""docs/quantization.md says what benchmarks/results/ says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_obq  # noqa: E402
import bench_quantize  # noqa: E402


def test_the_page_is_what_its_generators_make() -> None:
    text = bench_quantize.PAGE.read_text("utf-8")
    assert bench_quantize.page(text, bench_quantize.read()) == text, "run: python scripts/bench_quantize.py --page"
    draws = json.loads(bench_obq.RESULT.read_text("utf-8"))["draws"]
    assert bench_obq.page(text, draws) == text, "run: python scripts/bench_obq.py"


def row(method: str, kl: float, **settings: Any) -> dict[str, Any]:
    key = {"model": bench_quantize.EMBEDDED, "method": method, "bits": 4, "group_size": 128, "seed": 0} | settings
    return key | {"kl_mean": kl, "perplexity": 70.0, "tokens": 2040}


def test_where_gptq_is_not_below_rounding_to_nearest_is_said() -> None:
    rows = [row("RTN", 0.2), row("GPTQ", 0.1), row("GPTQ", 0.3, seed=1), row("GPTQ", 0.3, group_size=64)]
    assert bench_quantize.exceptions(rows) == (["embedded base, GPTQ, 4 bits, 128"], 2)
    empty = f"{bench_quantize.START}\n{bench_quantize.END}\n"
    assert "in 1 of 2 runs; not in: embedded base, GPTQ, 4 bits, 128." in bench_quantize.page(empty, rows)


def test_what_is_missing_is_shown_as_missing() -> None:
    empty = f"{bench_quantize.START}\n{bench_quantize.END}\n"
    rows = [row("RTN", 0.2), row("GPTQ", 0.1), row("GPTQ", 0.1, bits=3), row("GPTQ", 0.2, bits=3, seed=1)]
    made = bench_quantize.page(empty, rows)
    assert "The embedded base, dense perplexity missing, 2040 tokens, 1 of 3 seeds:" in made
    assert "| 4 | 128 | 0.2000 (70.00) | 0.1000 (70.00) | missing | missing |" in made
    assert "| 3 | 128 | missing | 0.1500 (70.00, 2 of 3 seeds) | missing | missing |" in made
    with pytest.raises(SystemExit, match="with"):
        bench_quantize.page("no marks", [])


def test_every_cell_is_asked_for_once() -> None:
    cells = list(bench_quantize.cells(bench_quantize.EMBEDDED))
    assert len(cells) == len(set(cells)) == 1 + 12 + 3 * 12 * 3 + 3 * 3 * (3 * 2 + 2)
    assert {cell.method for cell in bench_quantize.cells("another")} == {"dense", *bench_quantize.MAIN}

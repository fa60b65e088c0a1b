"""Every block of docs/ that a script makes says what its file in benchmarks/results/ says."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_quantize  # noqa: E402
import tables  # noqa: E402

MADE = re.compile(r"<!-- made by scripts/(bench_\w+)\.py -->")
BLOCKS = sorted(
    (page.name, name) for page in tables.DOCS.glob("*.md") for name in MADE.findall(page.read_text("utf-8"))
)
PARTS = {"bench_obq": "draws", "bench_offsite": None}
"""What a block is made of where that is not the rows; None for all there is."""


@pytest.mark.parametrize(("page", "script"), BLOCKS)
def test_a_block_is_what_its_script_makes(page: str, script: str) -> None:
    module: Any = importlib.import_module(script)
    assert module.PAGE.name == page
    document = tables.read_all(module.RESULT)
    part = PARTS.get(script, "rows")
    text = module.PAGE.read_text("utf-8")
    made = module.made(document if part is None else document[part])
    assert tables.placed(text, script, made) == text, f"run: python scripts/{script}.py"


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no <!-- made by scripts/bench_x\.py --> with"):
        tables.placed("<!-- made by scripts/bench_x.py -->\n", "bench_x", "")


def row(method: str, kl: float, **settings: Any) -> dict[str, Any]:
    key = {"model": bench_quantize.EMBEDDED, "method": method, "bits": 4, "group_size": 128, "seed": 0} | settings
    return key | {"kl_mean": kl, "perplexity": 70.0, "tokens": 2040}


def test_where_gptq_is_not_below_rounding_to_nearest_is_said() -> None:
    rows = [row("RTN", 0.2), row("GPTQ", 0.1), row("GPTQ", 0.3, seed=1), row("GPTQ", 0.3, group_size=64)]
    assert bench_quantize.exceptions(rows) == (["embedded base, GPTQ, 4 bits, 128"], 2)
    assert "in 1 of 2 runs; not in: embedded base, GPTQ, 4 bits, 128." in bench_quantize.made(rows)


def test_what_is_missing_is_shown_as_missing() -> None:
    rows = [row("RTN", 0.2), row("GPTQ", 0.1), row("GPTQ", 0.1, bits=3), row("GPTQ", 0.2, bits=3, seed=1)]
    made = bench_quantize.made(rows)
    assert "The embedded base, dense perplexity missing, 2040 tokens, 1 of 3 seeds:" in made
    assert "| 4 | 128 | 0.2000 (70.00) | 0.1000 (70.00) | missing | missing |" in made
    assert "| 3 | 128 | missing | 0.1500 (70.00, 2 of 3 seeds) | missing | missing |" in made


def test_every_cell_is_asked_for_once() -> None:
    cells = list(bench_quantize.cells(bench_quantize.EMBEDDED))
    assert len(cells) == len(set(cells)) == 1 + 12 + 3 * 12 * 3 + 3 * 3 * (3 * 2 + 2)
    assert {cell.method for cell in bench_quantize.cells("another")} == {"dense", *bench_quantize.MAIN}

"""What benchmarks measure: rows in a file of benchmarks/results/, and a block of a page of docs/ that is made of them.

A block stands between two marks that name its script. tests/test_result_pages.py holds every page to its files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from machine import describe_machine

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
Row = dict[str, Any]


def read_all(result: Path) -> dict[str, Any]:
    """What `write` was given; no rows before there is a file."""
    document = dict(json.loads(result.read_text("utf-8"))) if result.is_file() else {"rows": []}
    return {key: value for key, value in document.items() if key not in ("format_version", "machine")}


def read(result: Path) -> list[Row]:
    """The rows of a file."""
    return list(read_all(result)["rows"])


def write(result: Path, *, format_version: int = 1, **content: Any) -> None:
    """Write a file whole: what it was measured on, what holds for all rows, and the rows."""
    document = {"format_version": format_version, "machine": describe_machine(), **content}
    part = result.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    os.replace(part, result)


def placed(text: str, script: str, made: str) -> str:
    """A page with the block of a script made anew.

    Raises:
        SystemExit: where the page has no place for it.
    """
    begin, end = (f"<!-- {words} scripts/{script}.py -->" for words in ("made by", "end of"))
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"there is no {begin} with {end} after it in the page")
    return f"{before}{begin}\n{made}\n{end}{after}"


def put(page: Path, script: str, made: str) -> None:
    """The same, in its file."""
    page.write_text(placed(page.read_text("utf-8"), script, made), "utf-8")

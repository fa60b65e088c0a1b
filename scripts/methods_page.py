"""Write the table of methods into docs/methods.md from its results: `python scripts/methods_page.py`.

Everything between the two markers is made of benchmarks/results/methods.json; a test compares the two.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]
from methods import grid  # noqa: E402
from methods.tasks import TASKS, Task  # noqa: E402

PAGE = SCRIPTS.parent / "docs" / "methods.md"
RESULTS = SCRIPTS.parent / "benchmarks" / "results" / "methods.json"
BEGIN = "<!-- made by scripts/methods_page.py from benchmarks/results/methods.json -->"
END = "<!-- end of what scripts/methods_page.py makes -->"
MISSING = "missing"
REFERENCE = grid.OURS
INTRODUCTION = (
    "Each run is on one CPU thread: {e2e} steps of E2E and {wikisql} of WikiSQL on the embedded base, {sst2} of"
    " SST-2 and {cola} of CoLA (as many rows of each label) on all-MiniLM-L6-v2, at the method's own learning rate"
    " (a quarter of it beside the encoder's new head for what stands before the text) and the rest at its defaults"
    " (bitfit: bias=all; on the encoder, whose rows are sentences, 20 virtual tokens for prompt_tuning and"
    " p_tuning). The rate is the best of three on development rows of E2E and SST-2, {tries} steps each, on SST-2"
    " over two seeds, or the one in the middle where that is within {close} of it; \\* is a preset whose search is"
    " not finished. What is shown is of test rows: mean ± largest distance from it over three seeds on NF4, one"
    " seed elsewhere. *Of LoRA's* is what the development loss ends below the base's, as a share of LoRA's. Memory"
    " is the peak above the imports, seconds are of the CPU in training, both of NF4. `peft_lora` is PEFT's own,"
    " at LoRA's rank and PEFT's other defaults in the same loop, on the dense base, three seeds; `qa_lora` stands"
    " on int4 and int8g in the places of NF4 and int8. `python scripts/bench_methods.py` fills in what is missing."
)


def section(rows: list[dict[str, Any]], names: list[str]) -> str:
    """What stands between the markers."""
    steps = {name: task.steps for name, task in TASKS.items()}
    tries = " and ".join(map(str, grid.SEARCHED.values()))
    lines = [INTRODUCTION.format(**steps, tries=tries, close=f"{grid.CLOSE:.0%}"), ""]
    for name, task in TASKS.items():
        lines += [*_table(name, task, rows, names), ""]
    return "\n".join(lines)


def _table(name: str, task: Task, rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    head = f"| {task.title}, {task.unit} | rate | weights | NF4 | dense | int8 | of LoRA's | MB | s |"
    lines = [head, "| --- |" + " ---: |" * 8]
    final = [row for row in rows if (row["phase"], row["task"], row["steps"]) == ("final", name, task.steps)]
    for method in names:
        if grid.carried(method, name):
            rate = grid.rate_of(method, rows)
            mine = [row for row in final if row["method"] == method and row["learning_rate"] == rate]
            shown = MISSING if rate is None else f"{rate * _at(method, task):g}"
            shown += "" if rate is None or grid.choose(method, rows) else "\\*"
            lines.append(f"| `{method}` | {shown} | {_cells(task, method, mine, _reference(final, method))} |")
    return lines


def _at(method: str, task: Task) -> float:
    """The share of its rate that a method takes on a task: all of it but beside a new head."""
    from finetune.adapters.base import ADAPTERS

    return float(ADAPTERS.type_of(method).beside_head) if task.encoder else 1.0


def _cells(task: Task, method: str, rows: list[dict[str, Any]], lora: list[dict[str, Any]]) -> str:
    if any("refused" in row for row in rows):
        return " | ".join(["cannot carry it", *["—"] * 6])
    measured = [row for row in rows if row["quant"] == _base(method) and task.metric in row]
    weights = f"{measured[0]['trainable']:,}" if measured else MISSING
    memory = f"{statistics.median(r['peak_memory_bytes'] for r in measured) / 1e6:.0f}" if measured else MISSING
    seconds = f"{statistics.median(r['cpu_seconds'] for r in measured):.0f}" if measured else MISSING
    share = f"{_share(measured, lora):.0%}" if measured and lora else MISSING
    bases = [quant for quant, _ in grid.cells(method)]
    metrics = [
        _metric(task, [r for r in rows if r["quant"] == quant], bases.count(quant)) if quant else "—"
        for quant in grid.columns(method)
    ]
    return " | ".join([weights, *metrics, share, memory, seconds])


def _base(method: str) -> str:
    """The base that a method's memory and seconds are of, and its share of LoRA's fall."""
    return grid.cells(method)[0][0]


def _metric(task: Task, rows: list[dict[str, Any]], want: int) -> str:
    found = [100 * row[task.metric] for row in rows if row.get(task.metric) is not None]
    diverged = sum("diverged" in row for row in rows)
    if not found:
        return "diverged" if diverged else MISSING
    mean = statistics.mean(found)
    spread = f" ± {max(abs(value - mean) for value in found):.1f}" if len(found) > 1 else ""
    lacking = want - len(found)
    return f"{mean:.1f}{spread}" + (f" ({lacking} {'diverged' if diverged else MISSING})" if lacking else "")


def _reference(rows: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """Runs of LoRA on the same base, or on NF4 where it has none on that one."""
    base = _base(method) if _base(method) in grid.columns(REFERENCE) else _base(REFERENCE)
    same = [row for row in rows if (row["method"], row["quant"]) == (REFERENCE, base)]
    return [row for row in same if "refused" not in row and "dev_loss" in row]


def _share(rows: list[dict[str, Any]], lora: list[dict[str, Any]]) -> float:
    """What a method gains on its base as a share of what LoRA gains.

    LoRA's first loss is that of the base; what stands before the text changes the loss before it has learnt anything.
    """
    firsts = lora if rows[0]["quant"] == lora[0]["quant"] else rows
    gain = statistics.mean(row["dev_loss_first"] for row in firsts) - statistics.mean(row["dev_loss"] for row in rows)
    return gain / statistics.mean(grid.fall(row) for row in lora)


def page(text: str, rows: list[dict[str, Any]], names: list[str]) -> str:
    """The page with its section made anew.

    Raises:
        ValueError: where it has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"docs/methods.md lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{section(rows, names)}\n{END}{after}"


def read_rows() -> list[dict[str, Any]]:
    """The committed rows; none before there are results."""
    return list(json.loads(RESULTS.read_text("utf-8"))["rows"]) if RESULTS.is_file() else []


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8"), read_rows(), grid.methods()), "utf-8")

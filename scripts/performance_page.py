"""Writes the tables of docs/performance.md from benchmarks/results/*.json: `python scripts/performance_page.py`.

The page keeps its prose; what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is made here. A test holds
the committed page to the committed results.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
sys.path[:0] = [str(SCRIPTS)]
from cpu.bars import ONE_THREAD, STEP, TWO_THREADS, Bar, Row, decoding, only  # noqa: E402
from cpu.timing import BASE  # noqa: E402

RESULTS = SCRIPTS.parent / "benchmarks" / "results"
PAGE = SCRIPTS.parent / "docs" / "performance.md"
ISAS = {"native": "all of this CPU", "avx512_bf16": "without AMX"}
MODES = {"training": "forward + backward", "inference": "inference"}


def load(name: str) -> dict[str, Any]:
    """A committed result file; empty where it is not there."""
    path = RESULTS / name
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def table(head: Iterable[str], body: Iterable[Iterable[Any]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [list(map(str, head)), *(list(map(str, row)) for row in body)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """What the kernels were measured on."""
    about = load("kernels_cpu.json").get("machine", {})
    return ", ".join(f"{key} {value}" if key not in ("cpu", "date") else str(value) for key, value in about.items())


def under(isa: str, threads: int) -> list[Row]:
    """The kernel rows of one setting."""
    return only(load("kernels_cpu.json").get("rows", []), isa=isa, threads=threads)


def judged(bars: Iterable[Bar], columns: dict[str, list[Row]]) -> str:
    """Bars beside what was measured under several settings."""
    head = ["measure", "bar", *(word for name in columns for word in (name, "holds"))]
    body = [
        [
            bar.text,
            f"{'≤' if bar.at_most else '≥'} {bar.limit:g}",
            *(w for rows in columns.values() for w in bar.judged(rows)),
        ]
        for bar in bars
    ]
    return table(head, body)


def kernel_bars() -> str:
    """The bars of one thread."""
    return judged(ONE_THREAD, {words: under(isa, 1) for isa, words in ISAS.items()})


def thread_bars() -> str:
    """The bars of two threads."""
    return judged(TWO_THREADS, {words: under(isa, 2) for isa, words in ISAS.items()})


def step_bars() -> str:
    """The bars of the training step."""
    files = {"one thread": "step_cpu.json", "two threads": "step_cpu_2_threads.json"}
    return judged(STEP, {words: load(name).get("rows", []) for words, name in files.items()})


def decode_table() -> str:
    """Decoding times."""
    body = []
    for isa, words in ISAS.items():
        rows = under(isa, 1)
        for side in (2048, 4096):
            for pages in ("stock", "recycled"):
                times = [
                    decoding(rows, engine, side, pages, double)
                    for engine, double in (("fill", True), ("finetune", False), ("finetune", True),
                                           ("bitsandbytes", False), ("bitsandbytes", True))
                ]  # fmt: skip
                shown = ["" if time is None else f"{time:.2f}" for time in times]
                body.append([words, f"{side}x{side}", "fresh" if pages == "stock" else pages, *shown])
    head = [
        "CPU",
        "weight",
        "pages",
        "fill",
        "ours",
        "ours, double quant",
        "bitsandbytes",
        "bitsandbytes, double quant",
    ]
    return table(head, body)


def linear_table(section: str) -> Callable[[], str]:
    """Speeds over bf16 by engine and number of rows."""

    def build() -> str:
        parts = []
        for isa, words in ISAS.items():
            for mode, title in MODES.items():
                rows = only(under(isa, 1), section=section, mode=mode, pages="stock")
                counts = sorted({row["m"] for row in rows})
                if not counts:
                    continue
                dense = {row["m"]: row["milliseconds"] for row in only(rows, engine=BASE)}
                body: list[list[str]] = [["bf16, ms", *(f"{dense[count]:.2f}" for count in counts)]]
                for engine in dict.fromkeys(row["engine"] for row in rows if row["engine"] != BASE):
                    speeds = {row["m"]: row["speed"] for row in only(rows, engine=engine)}
                    body.append([engine, *(f"{speeds[count]:.2f}" if count in speeds else "" for count in counts)])
                parts.append(f"{title}, {words}:\n\n" + table(["M", *counts], body))
        return "\n\n".join(parts) or "Not measured."

    return build


def around_table() -> str:
    """Fused operators beside torch's own."""
    body = []
    for isa, words in ISAS.items():
        rows = only(under(isa, 1), section="around")
        for name in dict.fromkeys(row["operator"] for row in rows):
            mine, theirs = (only(rows, operator=name, engine=engine)[0] for engine in ("finetune", "torch"))
            body.append(
                [words, name, f"{theirs['milliseconds']:.2f}", f"{mine['milliseconds']:.2f}", f"{mine['speed']:.2f}"]
            )
    return table(["CPU", "operator", "torch, ms", "ours, ms", "speed"], body)


def startup() -> str:
    """The slowest answers."""
    found = load("startup.json")
    answers = sorted(found.get("answers", []), key=lambda answer: -answer["wall"])
    shown = [[" ".join(f"`{a}`" for a in answer["arguments"]), answer["wall"], answer["cpu"]] for answer in answers[:5]]
    if not answers:
        return "Not measured."
    walls = [answer["wall"] for answer in answers]
    shown.append([f"median of all {len(walls)}", f"{statistics.median(walls):.2f}", ""])
    return table(["command line", "seconds", "CPU seconds"], shown)


def others() -> str:
    """One line for each of the other measurements."""
    loading, quick, kills = load("load_memory.json"), load("quickstart.json"), load("kill_resume.json")
    gib = 2**30
    lines = []
    if loading:
        lines.append(
            f"- Loading a checkpoint of {loading['checkpoint_bytes'] / gib:.2f} GiB in NF4: peak of"
            f" {loading['peak_anonymous_bytes'] / gib:.2f} GiB above imports, {loading['seconds']:.0f} s;"
            f" the quantized model and one shard are {loading['bar_bytes'] / gib:.2f} GiB (`scripts/bench_load.py`)."
        )
    if quick:
        lines.append(
            f"- The quickstart: {quick['seconds']:.0f} s and {quick['peak_memory_bytes'] / gib:.2f} GiB,"
            f" held-out loss {quick['fall']:.1%} lower (`scripts/bench_quickstart.py`)."
        )
    if kills:
        lines.append(
            f"- {kills['kills']} kills at random instants: {kills['runs_bit_exact']} of {kills['runs']} runs bit-exact,"
            f" {kills['invalid_checkpoints_chosen']} invalid checkpoints chosen (`scripts/kill_resume.py`)."
        )
    return "\n".join(lines)


def gpu() -> str:
    """The acceptance on a CUDA host, where one was run."""
    parts = []
    for path in sorted(RESULTS.glob("gpu*.json")):
        rows = json.loads(path.read_text("utf-8")).get("rows", [])
        holds = {"pass": "yes", "fail": "**no**"}
        body = [
            [
                r["what"],
                r["bar"],
                r["measured"] if r["measured"] is not None else "",
                holds.get(r["result"], r["result"]),
            ]
            for r in rows
        ]
        parts.append(f"`{path.name}`:\n\n" + table(["measure", "bar", "measured", "holds"], body))
    return "\n\n".join(parts) or "No result of a GPU is committed: these bars are unmeasured."


BLOCKS: dict[str, Callable[[], str]] = {
    "machine": machine,
    "kernel bars": kernel_bars,
    "thread bars": thread_bars,
    "step bars": step_bars,
    "decode": decode_table,
    "nf4": linear_table("nf4"),
    "int8": linear_table("int8"),
    "groups": linear_table("groups"),
    "blocks": linear_table("blocks"),
    "around": around_table,
    "startup": startup,
    "others": others,
    "gpu": gpu,
}


def page(text: str) -> str:
    """The page with every block made anew.

    Raises:
        SystemExit: where a block is missing or unknown.
    """
    names = re.findall(r"<!-- begin (.+?) -->", text)
    if sorted(names) != sorted(BLOCKS):
        raise SystemExit(f"{PAGE.name} has the blocks {names}: expected each of {list(BLOCKS)} once")
    for name, build in BLOCKS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{PAGE.name} has no {end}")
        text = f"{before}{begin}\n{build()}\n{end}{after}"
    return text


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()

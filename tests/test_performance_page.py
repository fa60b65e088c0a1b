"""docs/performance.md says what benchmarks/results/ says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import performance_page  # noqa: E402
from cpu.bars import ONE_THREAD, STEP, TWO_THREADS, Bar  # noqa: E402
from cpu.timing import interleaved, speed  # noqa: E402


def test_the_page_is_what_its_generator_makes() -> None:
    text = performance_page.PAGE.read_text("utf-8")
    assert performance_page.page(text) == text, "run: python scripts/performance_page.py"


def test_a_missed_bar_is_said() -> None:
    rows = [
        {"section": "quantize", "engine": "finetune", "same_bits": True, "speed": 9.0},
        {"size": "25m", "engine": "finetune", "peak_bytes": 6.0},
        {"size": "25m", "engine": "peft+bitsandbytes", "peak_bytes": 10.0},
    ]
    said = {bar.text: bar.judged(rows) for bar in (*ONE_THREAD, *STEP)}
    assert said["NF4 quantizer over bitsandbytes, same bits"] == ("9.00", "**no**")
    assert said["peak memory of that step over theirs, 25M"] == ("0.60", "**no**")
    assert said["NF4 inference over bf16, M = 64"] == ("", "not measured")
    assert Bar("x", 0.5, lambda _: 0.4, at_most=True).judged([]) == ("0.40", "yes")


def test_a_ratio_over_another_engine_is_of_the_worst_row() -> None:
    rows = [
        {"section": "nf4", "pages": "stock", "mode": "training", "m": m, "engine": engine, "speed": value}
        for m, engine, value in ((512, "finetune nf4", 1.0), (512, "bitsandbytes nf4", 0.8),
                                 (1024, "finetune nf4", 0.9), (1024, "bitsandbytes nf4", 0.9))
    ]  # fmt: skip
    bar = next(bar for bar in TWO_THREADS if "fresh" in bar.text)
    assert bar.judged(rows) == ("1.00", "yes")
    skipped = [{**rows[0], "skipped": "broken"}, *rows[1:]]
    assert bar.judged(skipped) == ("", "not measured")


def test_engines_take_turns() -> None:
    order: list[str] = []
    ticks = iter(range(10_000))
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    samples = interleaved(calls, lambda: float(next(ticks)), rounds=3, seconds=0.5)
    assert order == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert speed([1.0, 2.0, 1.0], [2.0, 2.0, 3.0]) == 2.0 and {len(sample) for sample in samples.values()} == {3}


def test_the_benchmark_runs_and_keeps_its_bits() -> None:
    """The quick decoding section, an engine a process; nothing is written."""
    done = subprocess.run(
        [sys.executable, "scripts/bench_kernels.py", "--quick", "--sections", "quantize", "--seconds", "0.001"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["engine"] for row in rows} == {"finetune", "bitsandbytes"} and all(row["same_bits"] for row in rows)

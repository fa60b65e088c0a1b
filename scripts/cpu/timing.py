"""Timing engines beside each other on a machine that may do other work as well."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Callable[[], Any]
BASE = "bf16"
"""The engine that speeds are relative to: torch's own dense layer."""


def clock(threads: int) -> Callable[[], float]:
    """CPU time of the process for one thread, which other work hardly touches; wall time for several."""
    return time.process_time if threads == 1 else time.perf_counter


def interleaved(
    calls: Mapping[str, Call], now: Callable[[], float], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds a call, a sample a round for each engine; in every round the engines run in turn (A B C, A B C, ...).

    Args:
        calls: by engine.
        now: the clock.
        rounds: samples of each.
        seconds: a sample repeats a call until about so much has passed, and runs it once at least.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        start = now()
        call()
        repeats[name] = max(1, int(seconds / max(now() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = now()
            for _ in range(repeats[name]):
                call()
            samples[name].append((now() - start) / repeats[name])
    return samples


def speed(samples: Sequence[float], base: Sequence[float]) -> float:
    """How many times as fast as a base: the median over the rounds of what each round says."""
    return statistics.median(b / s for s, b in zip(samples, base, strict=True))

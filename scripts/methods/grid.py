"""What is measured of every method: the learning rates that are tried, the runs of the table, and what was chosen."""

from __future__ import annotations

import math
from typing import Any

Job = dict[str, Any]

RATES: dict[str, tuple[float, float, float]] = {
    "lora": (5e-4, 2e-3, 8e-3),
    "dora": (5e-4, 2e-3, 8e-3),
    "lora_plus": (1.25e-4, 5e-4, 2e-3),
    "pissa": (1.25e-4, 5e-4, 2e-3),
    "loftq": (5e-4, 2e-3, 8e-3),
    "qa_lora": (5e-4, 2e-3, 8e-3),
    "ia3": (5e-3, 2e-2, 8e-2),
    "bitfit": (1e-3, 4e-3, 1.6e-2),
    "norm_tuning": (1e-3, 4e-3, 1.6e-2),
    "houlsby": (5e-4, 2e-3, 8e-3),
    "pfeiffer": (5e-4, 2e-3, 8e-3),
    "parallel": (5e-4, 2e-3, 8e-3),
    "prompt_tuning": (1e-2, 4e-2, 1.6e-1),
    "p_tuning": (1e-3, 4e-3, 1.6e-2),
    "prefix": (1e-3, 4e-3, 1.6e-2),
    "p_tuning_v2": (1e-3, 4e-3, 1.6e-2),
    "prelayer": (4e-3, 1.6e-2, 6.4e-2),
}
"""Three rates a method, four times apart, for a base of hidden size 256; a method without a line here takes LoRA's."""
LEFT_OUT = {"stack": "several methods at once", "layers": "whole blocks, for offsite-tuning"}
"""Registered, but no method of the table, and why."""
EXTRA = {"bitfit": ("adapter.bias=all",)}
"""What a method needs besides its defaults on the bases here: the embedded one has no biases."""
SEARCHED = ("e2e", "sst2")
"""Tasks that a rate is chosen on, by the loss of their development rows."""
SEARCH_STEPS, STEPS = 60, 150
CELLS = (("nf4", 0), ("none", 0), ("int8", 0), ("nf4", 1), ("nf4", 2))
"""Base and seed of the runs that are reported."""


def methods() -> list[str]:
    """Every registered method but those left out."""
    from finetune.adapters.base import ADAPTERS

    return [name for name in ADAPTERS.types() if name not in LEFT_OUT]


def rates(method: str) -> tuple[float, ...]:
    """The rates that are tried."""
    return RATES.get(method, RATES["lora"])


def searches(task: str, names: list[str]) -> list[Job]:
    """The runs that a rate is chosen by: the same number for every method."""
    common = {"phase": "search", "task": task, "quant": "nf4", "seed": 0, "steps": SEARCH_STEPS}
    return [{**common, "method": name, "learning_rate": rates(name)[place]} for place in (1, 0, 2) for name in names]


def finals(task: str, names: list[str], rows: list[Job]) -> list[Job]:
    """The runs that are reported, of methods that a rate was chosen for."""
    common = {"phase": "final", "task": task, "steps": STEPS}
    chosen = {name: choose(name, rows) for name in names}
    return [
        {**common, "method": name, "quant": quant, "seed": seed, "learning_rate": chosen[name]}
        for quant, seed in CELLS
        for name in names
        if chosen[name] is not None
    ]


def key(row: Job) -> tuple[Any, ...]:
    """What tells runs apart."""
    return tuple(row[part] for part in ("phase", "task", "method", "quant", "seed", "steps", "learning_rate"))


def fall(row: Job) -> float:
    """How much a run lowered the loss of the development rows; -inf where it diverged."""
    if "diverged" in row or row["dev_loss"] is None or math.isnan(row["dev_loss"]):
        return -math.inf
    return float(row["dev_loss_first"] - row["dev_loss"])


def choose(method: str, rows: list[Job]) -> float | None:
    """The rate that lowers the loss most over the tasks searched, each counted by the best rate's fall on it.

    None before every task that has been searched at all has all of the method's rates.
    """
    tried = rates(method)
    scores = dict.fromkeys(tried, 0.0)
    searched = {row["task"] for row in rows if row["phase"] == "search"}
    for task in searched:
        mine = [r for r in rows if (r["phase"], r["task"], r["method"]) == ("search", task, method)]
        if any("refused" in row for row in mine):
            continue
        falls = {row["learning_rate"]: fall(row) for row in mine}
        if set(falls) < set(tried):
            return None
        best = max(max(falls.values()), 1e-9)
        for rate in tried:
            scores[rate] += max(falls[rate] / best, -1.0)
    return max(scores, key=lambda rate: scores[rate]) if any(scores.values()) else None

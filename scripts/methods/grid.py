"""What is measured of every method: the learning rates that are tried, the runs of the table, and what was chosen."""

from __future__ import annotations

import math
from typing import Any

from methods.tasks import TASKS

Job = dict[str, Any]

RATES: dict[str, tuple[float, float, float]] = {
    "lora": (1e-3, 2e-3, 4e-3),
    "dora": (1e-3, 2e-3, 4e-3),
    "lora_plus": (1.25e-4, 2.5e-4, 5e-4),
    "pissa": (5e-4, 1e-3, 2e-3),
    "loftq": (1e-3, 2e-3, 4e-3),
    "qa_lora": (1e-3, 2e-3, 4e-3),
    "ia3": (2e-2, 4e-2, 8e-2),
    "bitfit": (4e-3, 8e-3, 1.6e-2),
    "norm_tuning": (4e-3, 8e-3, 1.6e-2),
    "houlsby": (2e-3, 4e-3, 8e-3),
    "pfeiffer": (2e-3, 4e-3, 8e-3),
    "parallel": (1e-3, 2e-3, 4e-3),
    "peft_lora": (2e-3, 8e-3, 3.2e-2),
    "prompt_tuning": (2e-1, 4e-1, 8e-1),
    "p_tuning": (1e-3, 2e-3, 4e-3),
    "prefix": (2.5e-4, 5e-4, 1e-3),
    "p_tuning_v2": (1e-3, 2e-3, 4e-3),
    "prelayer": (1e-1, 2e-1, 4e-1),
}
"""Three rates a method, two to four times apart, for a base of hidden size 256 and for text: some methods take a share
of theirs beside a head made for the task (`AdapterConfig.beside_head`). Without a line here, LoRA's."""
LEFT_OUT = {
    "stack": "several methods at once",
    "layers": "whole blocks, for offsite-tuning",
    "qat": "for few bits: scripts/bench_qat.py",
    "qat_scales": "for few bits: scripts/bench_qat.py",
}
"""Registered, but no method of the table, and why."""
EXTRA = {"bitfit": ("adapter.bias=all",)}
"""What a method needs besides its defaults on the bases here: the embedded one has no biases."""
SHORT_ROWS = {name: ("adapter.prefix_length=20",) for name in ("prompt_tuning", "p_tuning")}
"""What it needs where a row is one sentence, on the encoder: a hundred virtual tokens drown the twenty of the text."""
SEARCHED = {"e2e": 60, "sst2": 200}
"""Tasks that a rate is chosen on, by the loss of their development rows, and the steps of such a run."""
SEARCH_SEEDS = {"e2e": (0,), "sst2": (0, 1)}
"""Of these runs: a rate too high collapses on the encoder with one seed and not with another."""
CLOSE = 0.03
"""Share of the best score within which the rate in the middle is taken: so few seeds tell no more."""
PEFT, OURS = "peft_lora", "lora"
"""PEFT's LoRA, on the dense base alone, and what it is compared with there."""
COLUMNS = ("nf4", "none", "int8")
"""Bases of the runs that are reported: three seeds on the first, one on the others."""
OTHER_COLUMNS: dict[str, tuple[str | None, ...]] = {
    PEFT: (None, "none", None),
    "qa_lora": ("int4", None, "int8g"),  # it wants a base stored in groups
}
SEEDS = (0, 1, 2)


def methods() -> list[str]:
    """Every registered method but those left out, and PEFT's LoRA."""
    from finetune.adapters.base import ADAPTERS

    return [*(name for name in ADAPTERS.types() if name not in LEFT_OUT), PEFT]


def carried(method: str, task: str) -> bool:
    """Whether a method has rows of a task: PEFT's LoRA is there for the tasks of text."""
    return method != PEFT or not TASKS[task].encoder


def cells(method: str) -> tuple[tuple[str, int], ...]:
    """Base and seed of a method's runs, the most telling ones first."""
    main, *others = [base for base in columns(method) if base is not None]
    three = [main, "none"] if method == OURS else [main]
    one = [(base, 0) for base in (main, *others)]
    return (*one, *((base, seed) for base in three for seed in SEEDS[1:]))


def columns(method: str) -> tuple[str | None, ...]:
    """The bases in the places of `COLUMNS`; None where the method has none there."""
    return OTHER_COLUMNS.get(method, COLUMNS)


def rates(method: str) -> tuple[float, ...]:
    """The rates that are tried."""
    return RATES.get(method, RATES["lora"])


def searches(task: str, names: list[str]) -> list[Job]:
    """The runs that a rate is chosen by: the same number for every method."""
    common = {"phase": "search", "task": task, "steps": SEARCHED[task]}
    return [
        {**common, "method": name, "quant": cells(name)[0][0], "seed": seed, "learning_rate": rates(name)[place]}
        for seed in SEARCH_SEEDS[task]
        for place in (1, 0, 2)
        for name in names
        if carried(name, task)
    ]


def finals(tasks: list[str], names: list[str], rows: list[Job]) -> list[Job]:
    """The runs that are reported, of methods that have a rate: each cell of all tasks before the next."""
    chosen = {name: rate_of(name, rows) for name in names}
    return [
        {
            "phase": "final", "task": task, "steps": TASKS[task].steps,
            "method": name, "quant": quant, "seed": seed, "learning_rate": chosen[name],
        }
        for turn in range(max(len(cells(name)) for name in names))
        for task in tasks
        for name in names
        for quant, seed in cells(name)[turn : turn + 1]
        if chosen[name] is not None and carried(name, task)
    ]  # fmt: skip


def key(row: Job) -> tuple[Any, ...]:
    """What tells runs apart."""
    return tuple(row[part] for part in ("phase", "task", "method", "quant", "seed", "steps", "learning_rate"))


def fall(row: Job) -> float:
    """How much a run lowered the loss of the development rows; -inf where it diverged."""
    if "diverged" in row or row["dev_loss"] is None or math.isnan(row["dev_loss"]):
        return -math.inf
    return float(row["dev_loss_first"] - row["dev_loss"])


def rate_of(method: str, rows: list[Job]) -> float | None:
    """The rate chosen; before every one has been tried the method's own preset. None for a method without one."""
    from finetune.adapters.base import ADAPTERS

    chosen = choose(method, rows)
    if chosen is None and method in ADAPTERS.types():
        return float(ADAPTERS.type_of(method)().learning_rate)
    return chosen


def choose(method: str, rows: list[Job]) -> float | None:
    """The rate that lowers the loss most over the tasks searched, each counted by the best fall of LoRA on it.

    One scale for all methods: where a method learns next to nothing on a task, what it does there decides nothing. The
    middle rate where it does about as well as the best. None before every task that has been searched at all has all of
    the method's rates, and LoRA's.
    """
    tried = rates(method)
    scores = dict.fromkeys(tried, 0.0)
    searched = {row["task"] for row in rows if row["phase"] == "search"}
    for task in searched:
        if not carried(method, task):
            continue
        falls, lora = _falls(method, task, rows), _falls(OURS, task, rows)
        if falls is None:  # refused there
            continue
        if set(falls) < set(tried) or lora is None or set(lora) < set(rates(OURS)):
            return None
        for rate in tried:
            scores[rate] += max(falls[rate] / max(lora.values()), -1.0)
    best = max(scores, key=lambda rate: scores[rate])
    near = scores[tried[1]] >= (1 - CLOSE) * scores[best]
    return (tried[1] if near else best) if any(scores.values()) else None


def _falls(method: str, task: str, rows: list[Job]) -> dict[float, float] | None:
    """What each rate lowered the loss by, the mean over all seeds; None where the task refuses the method."""
    mine = [r for r in rows if (r["phase"], r["task"], r["method"]) == ("search", task, method)]
    if any("refused" in row for row in mine):
        return None
    falls = {(row["learning_rate"], row["seed"]): fall(row) for row in mine}
    seeds, tried = SEARCH_SEEDS[task], {row["learning_rate"] for row in mine}
    return {
        rate: sum(falls[rate, seed] for seed in seeds) / len(seeds)
        for rate in tried
        if all((rate, seed) in falls for seed in seeds)
    }

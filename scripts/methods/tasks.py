"""The tasks of the table of methods: their rows, their base and how they are measured."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Task:
    """One data set on one base.

    Attributes:
        title: for people.
        encoder: whether it runs on the encoder, else on the embedded base.
        metric, unit: what is reported of the test rows; higher is better.
        steps: of a run that is reported.
        overrides: of the configuration.
        read: from the folder of data to rows for training, choosing and reporting.
    """

    title: str
    encoder: bool
    metric: str
    unit: str
    steps: int
    overrides: tuple[str, ...]
    read: Callable[[Path], dict[str, Rows]]


def _lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _e2e(data: Path) -> dict[str, Rows]:
    """Meaning representations to sentences. There is no training file: most of the development one serves."""
    dev, test = _lines(data / "nlg" / "e2e_dev.jsonl"), _lines(data / "nlg" / "e2e_test.jsonl")
    random.Random(0).shuffle(dev)
    held, rest = dev[:60], dev[60:]
    test = random.Random(0).sample(test, 150)
    return {
        "train": [_sentence(row, ref) for row in rest for ref in row["refs"][:3]],
        "dev": [_sentence(row, row["refs"][0]) for row in held],
        "test": [_sentence(row, row["refs"][0]) | {"references": row["refs"]} for row in test],
    }


def _sentence(row: dict[str, Any], reference: str) -> dict[str, Any]:
    return {"mr": row["mr"], "completion": f" {reference}"}


def _sql(data: Path) -> dict[str, Rows]:
    """Questions to SQL."""

    def rows(split: str, count: int) -> Rows:
        found = random.Random(0).sample(_lines(data / "sql" / f"wikisql_{split}.jsonl"), count)
        return [{"question": row["question"], "completion": f" {row['sql']}"} for row in found]

    return {"train": rows("train", 2000), "dev": rows("dev", 100), "test": rows("test", 300)}


def _classes(name: str) -> Callable[[Path], dict[str, Rows]]:
    def read(data: Path) -> dict[str, Rows]:
        folder = data / "cls"
        if name == "sst2":
            test = _lines(folder / "sst2_test.jsonl")
            dev = _lines(folder / "sst2_dev.jsonl")
        else:  # CoLA's test labels are not public: the out-of-domain half of its development set is reported
            dev, test = _lines(folder / "cola_dev_in.jsonl"), _lines(folder / "cola_dev_out.jsonl")
        train = _lines(folder / f"{name}_train.jsonl")
        if name == "cola":
            train, dev = _balanced(train), _balanced(dev)
        found = {"train": train, "dev": dev[:200], "test": test[:600]}
        return {split: [{"text": row["text"], "label": row["label"]} for row in rows] for split, rows in found.items()}

    return read


def _balanced(rows: Rows) -> Rows:
    """As many rows of each label: with CoLA's own 70 % of one, few steps learn nothing but to say that one."""
    groups = [[row for row in rows if row["label"] == label] for label in sorted({row["label"] for row in rows})]
    chosen = [row for group in groups for row in random.Random(0).sample(group, min(map(len, groups)))]
    random.Random(1).shuffle(chosen)
    return chosen


_TEXT = ("data.packing=false", "data.max_length=192", "train.batch_size=8")
_ROWS = ("objective=classification", "data.max_length=64", "train.epochs=1000")
TASKS = {
    "e2e": Task("E2E, data to text", False, "bleu", "BLEU", 240, (*_TEXT, 'data.template="{mr}\\nText:"'), _e2e),
    "wikisql": Task(
        "WikiSQL, text to SQL",
        False,
        "token_accuracy",
        "share of the answers' tokens that are the likeliest",
        150,
        (*_TEXT, 'data.template="{question}\\nSQL:"'),
        _sql,
    ),
    "sst2": Task("SST-2", True, "accuracy", "accuracy", 200, (*_ROWS, "train.batch_size=16"), _classes("sst2")),
    "cola": Task("CoLA", True, "matthews", "Matthews", 300, (*_ROWS, "train.batch_size=32"), _classes("cola")),
}


def write_rows(task: Task, data: Path, folder: Path) -> dict[str, Path]:
    """A task's rows as files, one a split."""
    paths = {}
    for split, rows in task.read(data).items():
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return paths

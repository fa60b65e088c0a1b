"""What a base is opened for: which of transformers' heads stands on it, and what that head gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import ConfigError, nearest

AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
"""Kinds of tasks, and the class of transformers that opens a checkpoint for each."""

WORDS = {
    "causal_lm": "causal language model",
    "classification": "sequence classifier",
    "regression": "sequence regressor",
    "seq2seq": "sequence-to-sequence model",
}
PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}
"""`problem_type` of config.json, by which stock pipelines choose between softmax and the plain value."""


@dataclass(frozen=True)
class Task:
    """What a base is opened for.

    Attributes:
        kind: causal_lm | classification | regression | seq2seq.
        labels: names of the classes, in the order of the head's outputs; of a classification alone.
    """

    kind: str = "causal_lm"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in AUTO_CLASSES:
            raise ConfigError(
                f"a task is {self.kind!r}: expected {' | '.join(AUTO_CLASSES)}{nearest(self.kind, AUTO_CLASSES)}"
            )
        if (self.kind == "classification") != bool(self.labels):
            raise ConfigError(
                "a classification head without labels: name the classes"
                if not self.labels
                else f"a task of kind {self.kind} has no labels, but {len(self.labels)} are given"
            )
        if self.kind == "classification" and len(set(self.labels)) < max(2, len(self.labels)):
            raise ConfigError(f"a classification needs two different labels or more, not {', '.join(self.labels)}")

    @property
    def words(self) -> str:
        """What a model for it is called."""
        return WORDS[self.kind]

    @property
    def judges_rows(self) -> bool:
        """Whether the model gives one answer a row, by a head of its own, in place of tokens."""
        return judges_rows(self.kind)

    def auto_class(self) -> Any:
        """The class of transformers that opens a checkpoint for it."""
        import transformers

        return getattr(transformers, AUTO_CLASSES[self.kind])

    def configure(self, config: Any) -> Any:
        """Set what a transformers configuration says of the head: classes and their names. Returns the same object."""
        if not self.judges_rows:
            return config
        names = self.labels or ("value",)
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.problem_type = PROBLEMS[self.kind]
        return config


def judges_rows(kind: str) -> bool:
    """Whether a kind of task is about rows as a whole."""
    return kind in PROBLEMS


def named_classes(found: Sequence[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of some rows in the order of a checkpoint's own head, where the two agree; else as found.

    They agree where the rows name exactly the classes that config.json names, or number them.

    Args:
        found: labels of the rows.
        config: config.json of the checkpoint.
    """
    told = own_classes(config)
    numbers = [str(number) for number in range(len(told))]
    return told if sorted(found) in (sorted(told), sorted(numbers)) else tuple(found)


def own_classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that config.json names; none where it has only transformers' placeholders (`LABEL_0`)."""
    told = config.get("id2label")
    if not isinstance(told, dict) or not all(str(key).isdecimal() for key in told):
        return ()
    names = tuple(str(told[key]) for key in sorted(told, key=int))
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


CAUSAL_LM = Task()
"""What a base is opened for where nothing else is said."""

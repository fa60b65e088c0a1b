"""Rows with a label: what the label of a row is learnt as.

A classification learns one of several classes, named by whatever the rows call them; a regression learns a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from finetune.data.config import DataConfig
from finetune.data.conversation import BadRow, Conversation
from finetune.errors import ConfigError

LISTED = 8
"""Classes named in a message."""


@dataclass(frozen=True)
class Labelling:
    """How the label of a row becomes what is learnt.

    Attributes:
        names: of the classes, in the order of the head's outputs; empty where a number is learnt.
        segments: whether the model tells the two texts of a pair apart by token types.
    """

    names: tuple[str, ...] = ()
    segments: bool = False

    @property
    def dtype(self) -> type:
        """Of a target: int64 for classes, float32 for numbers."""
        return np.float32 if not self.names else np.int64

    def target(self, text: str) -> float:
        """The class of a label, by its name or else by its number; or the number that it spells.

        Raises:
            BadRow: for a class that there is not, or what is no finite number.
        """
        if not self.names:
            return _number(text)
        if text in self.names:
            return self.names.index(text)
        if text.isascii() and text.isdecimal() and int(text) < len(self.names):
            return int(text)
        raise BadRow(f"'label' is {text!r}: expected one of {listed(self.names)}")

    def describe(self, targets: np.ndarray) -> str:
        """The labels of some rows in words: how many of each class, or where the numbers lie."""
        if self.names:
            counts = np.bincount(targets.astype(np.int64), minlength=len(self.names))
            words = [f"{name} {count}" for name, count in zip(self.names, counts, strict=True)]
            return ", ".join(words[:LISTED]) + (", ..." if len(words) > LISTED else "")
        values = targets.astype(np.float64)
        return (
            f"{values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}, standard deviation {values.std():.4g}"
        )


def listed(names: Sequence[str]) -> str:
    """Classes for a message."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def label_of(conversation: Conversation) -> str:
    """What a labelled row was labelled with; it stands where an answer would."""
    return conversation.turns[-1].text


def refuse_labels(config: DataConfig) -> None:
    """Refuse labelled rows where nothing learns labels.

    Raises:
        ConfigError: saying which objectives do.
    """
    if config.format == "labelled":
        raise ConfigError("data.format=labelled needs objective=classification or objective=regression")


def for_labels(config: DataConfig, objective: str) -> DataConfig:
    """The settings by which the rows are read as labelled ones.

    Raises:
        ConfigError: for a format or a way of making rows that a label does not go with.
    """
    if config.format not in ("auto", "labelled"):
        raise ConfigError(
            f"data.format={config.format} conflicts with objective={objective}, which learns the label of a row:"
            " set it to labelled"
        )
    if config.packing:
        raise ConfigError(
            f"data.packing=true conflicts with objective={objective}: a label belongs to a sequence, and packing puts"
            " several rows into one; set it to false"
        )
    if config.too_long == "split":
        raise ConfigError(
            f"data.too_long=split conflicts with objective={objective}: a label belongs to the whole row; set it to"
            " truncate, drop or error"
        )
    return replace(config, format="labelled")


def _number(text: str) -> float:
    if not is_number(text):
        raise BadRow(f"'label' is {text!r}: expected a number")
    return float(text)


def is_number(text: str) -> bool:
    """Whether a text spells a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

"""Rows that are longer than `data.max_length`."""

from __future__ import annotations

import numpy as np

from finetune.data.conversation import BadRow
from finetune.data.rows import IGNORE, Row
from finetune.errors import ConfigError, DataError

LONGEST_BY_DEFAULT = 2048


def longest(max_length: int | None, context: int) -> int:
    """Tokens a row may have: `data.max_length`, or min(context, 2048) where it is null.

    Args:
        max_length: of the configuration.
        context: tokens the model can attend over.

    Raises:
        ConfigError: when more is asked for than the model has.
    """
    if max_length is None:
        return min(context, LONGEST_BY_DEFAULT)
    if max_length > context:
        raise ConfigError(f"data.max_length is {max_length}, more than the model's context of {context} tokens")
    return max_length


def fit(row: Row, max_length: int, too_long: str, origin: str) -> list[Row]:
    """The row as it may be learnt: itself, its beginning, its pieces, or nothing.

    Args:
        row: of any length.
        max_length: tokens.
        too_long: truncate (keep the beginning) | drop | split (into pieces, those without anything to learn left out)
            | error.
        origin: `file:line`, in messages.

    Raises:
        BadRow: when nothing to learn is left.
        DataError: for `error`, naming the row.
    """
    length = len(row.input_ids)
    if length <= max_length:
        return [row]
    if too_long == "drop":
        return []
    if too_long == "error":
        raise DataError(
            f"{origin}: the row has {length} tokens and data.max_length is {max_length} (data.too_long=error)"
        )
    starts = range(0, length, max_length) if too_long == "split" else [0]
    pieces = [_piece(row, start, start + max_length) for start in starts]
    pieces = [piece for piece in pieces if len(piece.labels)]
    if not pieces:
        raise BadRow(
            f"nothing to learn within {max_length} tokens: its prompt is longer (data.too_long=drop leaves it out)"
        )
    return pieces


def _piece(row: Row, start: int, stop: int) -> Row:
    labels = np.array(row.labels[start:stop])
    labels[0] = IGNORE  # nothing precedes it in its sequence
    learnt = np.flatnonzero(labels != IGNORE)
    used = int(learnt[-1]) + 1 if len(learnt) else 0  # what follows the last learnt token teaches nothing
    return Row(row.input_ids[start : start + used], labels[:used])

"""Tokenized rows, and the batches made of them.

Shape suffixes: B rows of the batch, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not learnt (torch's own default for cross entropy)."""


@dataclass(frozen=True)
class Row:
    """One row: token ids and, at each position, the token to learn there or `IGNORE`. Labels are NOT shifted."""

    input_ids: np.ndarray
    labels: np.ndarray


class TokenRows(Sequence[Row]):
    """Rows in three flat arrays, so that a million of them cost no Python objects.

    Args:
        input_ids: int32, all rows behind one another.
        labels: int32, the same length.
        offsets: int64 [rows + 1]; row i is [offsets[i], offsets[i + 1]).
    """

    def __init__(self, input_ids: np.ndarray, labels: np.ndarray, offsets: np.ndarray) -> None:
        self.input_ids, self.labels, self.offsets = input_ids, labels, offsets

    @classmethod
    def of(cls, rows: Sequence[Row]) -> TokenRows:
        """Flatten rows."""
        offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)]).astype(np.int64)
        empty = np.zeros(0, np.int32)
        ids = np.concatenate([empty, *(row.input_ids for row in rows)]).astype(np.int32)
        labels = np.concatenate([empty, *(row.labels for row in rows)]).astype(np.int32)
        return cls(ids, labels, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return TokenRows.of([self[i] for i in range(*index.indices(len(self)))])
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        cut = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Row(self.input_ids[cut], self.labels[cut])

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.offsets)


@dataclass
class Batch:
    """What a model is fed.

    Attributes:
        input_ids_BS, labels_BS, position_ids_BS: int64; labels are not shifted.
        attention_mask_BS: 1 for real positions; None where rows are packed (positions restart at each row, which is
        what
            transformers separates rows by; a mask of ones would silently join them).
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    attention_mask_BS: Tensor | None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        mask = None if self.attention_mask_BS is None else self.attention_mask_BS.to(device)
        return Batch(self.input_ids_BS.to(device), self.labels_BS.to(device), self.position_ids_BS.to(device), mask)

    def model_inputs(self) -> dict[str, Tensor | bool]:
        """Keyword arguments of a transformers model, without labels."""
        inputs: dict[str, Tensor | bool] = {
            "input_ids": self.input_ids_BS,
            "position_ids": self.position_ids_BS,
            "use_cache": False,
        }
        if self.attention_mask_BS is not None:
            inputs["attention_mask"] = self.attention_mask_BS
        return inputs

    def target_tokens(self) -> int:
        """How many positions are learnt: labels after the shift by one, where the next position is of the same row."""
        return int((self.shifted_labels_BS() != IGNORE).sum())

    def shifted_labels_BS(self) -> Tensor:
        """Labels moved one to the left: what position s has to predict; `IGNORE` at the end of every row."""
        shifted = torch.full_like(self.labels_BS, IGNORE)
        shifted[:, :-1] = self.labels_BS[:, 1:]
        starts = self.position_ids_BS[:, 1:] == 0
        shifted[:, :-1][starts] = IGNORE
        return shifted

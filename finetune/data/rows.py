"""Tokenized rows, and the batches made of them.

Shape suffixes: B rows of the batch, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not learnt (torch's own default for cross entropy)."""


@dataclass(frozen=True)
class Row:
    """One row: token ids and, at each position, the token to learn there or `IGNORE`. Labels are NOT shifted.

    Attributes:
        target: what is learnt of the row as a whole, a class (int64) or a number (float32); None where tokens are.
        token_types: which text of a pair each token belongs to; None where the model is not told.
        source: how many of the first tokens an encoder reads, the rest being what its decoder writes; None without one.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    target: np.generic | None = None
    token_types: np.ndarray | None = None
    source: int | None = None


class TokenRows(Sequence[Row]):
    """Rows in a few flat arrays, so that a million of them cost no Python objects.

    Args:
        input_ids: int32, all rows behind one another.
        labels: int32, the same length.
        offsets: int64 [rows + 1]; row i is [offsets[i], offsets[i + 1]).
        targets: int64 or float32 [rows], see `Row`; all rows have one or none has.
        token_types: int8, as long as the ids; likewise.
        sources: int32 [rows]; likewise.
    """

    def __init__(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        offsets: np.ndarray,
        targets: np.ndarray | None = None,
        token_types: np.ndarray | None = None,
        sources: np.ndarray | None = None,
    ) -> None:
        self.input_ids, self.labels, self.offsets = input_ids, labels, offsets
        self.targets, self.token_types, self.sources = targets, token_types, sources

    @classmethod
    def of(cls, rows: Sequence[Row]) -> TokenRows:
        """Flatten rows."""
        offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)]).astype(np.int64)
        empty = np.zeros(0, np.int32)
        ids = np.concatenate([empty, *(row.input_ids for row in rows)]).astype(np.int32)
        labels = np.concatenate([empty, *(row.labels for row in rows)]).astype(np.int32)
        targets = np.array([row.target for row in rows]) if rows and rows[0].target is not None else None
        told = [row.token_types for row in rows if row.token_types is not None]
        types = np.concatenate(told).astype(np.int8) if told else None
        sources = np.array([row.source for row in rows], np.int32) if rows and rows[0].source is not None else None
        return cls(ids, labels, offsets, targets, types, sources)

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
        return Row(
            self.input_ids[cut],
            self.labels[cut],
            None if self.targets is None else self.targets[index],
            None if self.token_types is None else self.token_types[cut],
            None if self.sources is None else int(self.sources[index]),
        )

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
        what transformers separates rows by; a mask of ones would silently join them).
        targets_B: int64 classes or float32 numbers, where rows are learnt as a whole; else None.
        token_types_BS: int64, where the model reads them; else None.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    attention_mask_BS: Tensor | None
    targets_B: Tensor | None = None
    token_types_BS: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in held.items() if tensor is not None})

    def model_inputs(self) -> dict[str, Tensor | bool]:
        """Keyword arguments of a transformers model, without labels.

        Rows that are learnt as a whole come without positions: encoders count theirs in ways of their own (RoBERTa's
        begin behind the padding's), and the mask says all there is to know.
        """
        if self.targets_B is not None:
            assert self.attention_mask_BS is not None, "rows with a target are never packed"
            whole: dict[str, Tensor | bool] = {"input_ids": self.input_ids_BS, "attention_mask": self.attention_mask_BS}
            return whole if self.token_types_BS is None else {**whole, "token_type_ids": self.token_types_BS}
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


@dataclass
class PairBatch(Batch):
    """What an encoder and its decoder are fed: tokens [B, S] to read, and labels [B, T] of what is written about them.

    Logits stand over the labels: the model moves them to the right by itself and begins with its own start token.

    Attributes:
        position_ids_BS: [B, T], counting through; the model is not told.
    """

    def model_inputs(self) -> dict[str, Tensor | bool]:
        """With labels, from which the model makes what its decoder reads."""
        assert self.attention_mask_BS is not None, "rows of an encoder and a decoder are never packed"
        read: dict[str, Tensor | bool] = {"input_ids": self.input_ids_BS, "attention_mask": self.attention_mask_BS}
        return read | {"labels": self.labels_BS, "use_cache": False}

    def shifted_labels_BS(self) -> Tensor:
        """[B, T]: the labels, which are where they are to be predicted."""
        return self.labels_BS

"""Calibration and held-out rows of models that read each by itself: encoders, classifiers, encoders with a decoder.

What an encoder reads is encoded as its tokenizer encodes a text, or a pair of texts; what an encoder and its decoder
read and write, as objective=seq2seq does. Batches are of rows of one length, so that nothing is padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from finetune.data.batching import collate
from finetune.data.config import DataConfig
from finetune.data.labels import Labelling
from finetune.data.lengths import longest
from finetune.data.pairs import check_pairs
from finetune.data.rows import Batch, TokenRows
from finetune.data.sources import Source, recognise_all, resolve
from finetune.data.tokenizing import Recipe, take, tokenize_side
from finetune.model.held import Held
from finetune.quant.base import QuantConfig
from finetune.quantize.config import CalibrationConfig
from finetune.quantize.text import BATCH_TOKENS, HELD_OUT, MOST_NUMBERS, Text, check_enough, check_tokens, forms_of

MOST_ROWS = 1024
"""Rows that are measured on, at most."""
BATCH_ROWS = 32
"""Rows that are run at a time, at most."""


@dataclass(frozen=True)
class Unlabelled(Labelling):
    """Rows of which only the text is read; whatever label there is counts as 0."""

    @property
    def dtype(self) -> type:
        return np.int64

    def target(self, text: str) -> float:
        return 0


@dataclass
class Uncached(Batch):
    """Rows of a model that would hand its blocks a cache, which grows whenever a block is run again."""

    def model_inputs(self) -> dict[str, Tensor | bool]:
        return super().model_inputs() | {"use_cache": False}


@dataclass(frozen=True)
class Reader:
    """How the rows of one model are read.

    Attributes:
        config: which rows.
        held: what the model is.
        tokenizer: its own.
        context: tokens that the model can attend over.
        segments: whether the model tells the texts of a pair apart.
        caches: whether it can be told to use no cache.
    """

    config: CalibrationConfig
    held: Held
    tokenizer: Any
    context: int
    segments: bool
    caches: bool

    @property
    def length(self) -> int:
        """Tokens a row may have.

        Raises:
            ConfigError: where more are asked for than the model has.
        """
        # RoBERTa counts its positions from two, and its tokenizer knows.
        return longest(self.config.max_length, min(self.context, self.tokenizer.model_max_length))

    def read(self, key: str, value: Any, measured: bool) -> tuple[TokenRows, list[Source], bool]:
        """The rows of a source, its parts, and whether their labels are known.

        Args:
            measured: labels count.
        """
        data, sources = self._data(value), resolve(value, key, side="eval" if key == "data.eval" else "train")
        pairs = self.held.kind == "seq2seq"
        forms, labelled = (recognise_all(data, sources), False) if pairs else forms_of(data, sources, labels_first=True)
        known = measured and labelled and self.held.kind == "classification"
        kind = Labelling if known else Unlabelled
        labelling = None if pairs else kind(self.held.labels, self.segments)
        recipe = Recipe(data, self.tokenizer, None, self.length, labelling, pairs)
        return tokenize_side(key, sources, forms, recipe).rows, sources, known

    def _data(self, value: Any) -> DataConfig:
        """A long row is cut off: its beginning is what the model reads."""
        data = replace(self.config.reading(value), too_long="truncate")
        if self.held.kind == "seq2seq":
            check_pairs(data, f"a {self.held.words}")
        return data


class RowText(Text):
    """Rows to calibrate and to measure on, in place of pieces.

    Args:
        calibration, eval: tokens.
        labelled: whether the targets of `eval` are labels.
        pad_id: fills up nothing; batches want one.
        together: rows that are run at a time, at most.
        caches: as `Reader`.
    """

    def __init__(
        self, calibration: TokenRows, eval: TokenRows, labelled: bool, pad_id: int, together: int, caches: bool
    ) -> None:
        super().__init__(labelled=labelled)
        self.calibration_rows, self.eval_rows = calibration, eval
        self.pad_id, self.together, self.caches = pad_id, together, caches

    @property
    def tokens(self) -> int:
        return len(self.calibration_rows.input_ids)

    @property
    def measures(self) -> bool:
        return len(self.eval_rows) > 0

    def batches(self, tokens: int = BATCH_TOKENS) -> list[dict[str, Any]]:
        return [batch.model_inputs() for batch in self._batches(self.calibration_rows, tokens)]

    def measured(self, width: int) -> list[Batch]:
        """As many rows as there is room for, `width` numbers at each position that is compared."""
        kept = _within(self.eval_rows, MOST_NUMBERS // width)
        return self._batches(self.eval_rows[:kept])

    def digests(self) -> dict[str, str]:
        return {"calibration": _digest(self.calibration_rows), "eval": _digest(self.eval_rows)}

    def _batches(self, rows: TokenRows, tokens: int = BATCH_TOKENS) -> list[Batch]:
        alike: dict[tuple[int, int], list[int]] = {}
        for number, row in enumerate(rows):
            alike.setdefault((len(row.input_ids), row.source or 0), []).append(number)
        batches = []
        for (length, _), numbers in alike.items():
            step = min(self.together, max(1, tokens // length))
            parts = (numbers[start : start + step] for start in range(0, len(numbers), step))
            batches += [collate(rows, [[number] for number in part], self.pad_id) for part in parts]
        if self.caches and rows.sources is None:
            return [Uncached(**vars(batch)) for batch in batches]
        return batches


def read_rows(reader: Reader, vocabulary: int, quant: QuantConfig, pad_id: int, together: int = BATCH_ROWS) -> RowText:
    """The rows to calibrate and to measure on.

    Args:
        vocabulary: rows of the model's embeddings.
        quant: whose groups have to be smaller than the text.
        pad_id, together: as `RowText`.

    Raises:
        DataError: for rows that are empty, in another vocabulary, or fewer tokens than a group.
    """
    config, empty = reader.config, TokenRows.of([])
    calibration, held_out, known = empty, empty, False
    if config.eval is not None:
        held_out, sources, known = reader.read("data.eval", config.eval, True)
        check_tokens("data.eval", held_out.input_ids, sources, reader.tokenizer, vocabulary)
    if config.calibration is not None:
        own = config.eval is None
        rows, sources, labelled = reader.read("data.calibration", config.calibration, own)
        check_tokens("data.calibration", rows.input_ids, sources, reader.tokenizer, vocabulary)
        if own and len(rows) > 1:
            every = min(HELD_OUT, len(rows))
            chosen = np.arange(len(rows)) % every == every - 1
            held_out, known = take(rows, np.flatnonzero(chosen)), labelled
            rows = take(rows, np.flatnonzero(~chosen))
        calibration = rows[: config.samples]
        check_enough(len(calibration.input_ids), quant)
    return RowText(calibration, held_out[:MOST_ROWS], known, pad_id, together, reader.caches)


def _within(rows: TokenRows, room: int) -> int:
    """How many of the first rows have so many positions, at least one row."""
    positions = rows.lengths() - (0 if rows.sources is None else rows.sources)
    return max(1, int((np.cumsum(positions) <= room).sum())) if len(rows) else 0


def _digest(rows: TokenRows) -> str:
    digest = hashlib.sha256()
    parts: Iterable[np.ndarray | None] = (rows.input_ids, rows.offsets, rows.targets, rows.token_types, rows.sources)
    for part in parts:
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()

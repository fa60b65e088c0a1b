"""Rows with a label on their way to tokens: a text, or a pair of texts, as the tokenizer itself encodes them.

No chat template and no end of sequence is added: a classifier reads what the model was pretrained to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.conversation import BadRow, Conversation
from finetune.data.labels import Labelling, label_of
from finetune.data.rows import IGNORE, Row
from finetune.data.samples import Sample
from finetune.errors import DataError

SEPARATOR = "\n"
"""Between the two texts of a pair, where a person reads them."""


@dataclass(frozen=True)
class LabelledEncoder:
    """Tokenizes labelled rows.

    Attributes:
        tokenizer: of transformers; left unchanged.
        labelling: how a label becomes a target.
        max_length: tokens a row.
        too_long: truncate (the longer of two texts first) | drop | error.
    """

    tokenizer: Any
    labelling: Labelling
    max_length: int
    too_long: str

    def rows(
        self, conversations: Sequence[Conversation], origins: Sequence[str]
    ) -> Iterator[tuple[Row | BadRow | None, bool]]:
        """For each row its tokens and target, the fault that it has, or None where it is too long and dropped; and
        whether it is too long.

        Raises:
            DataError: for a row that is too long where `too_long` is error.
        """
        whole = self._encode(conversations, truncate=False)
        cut = self._encode(conversations, truncate=True) if any(len(ids) > self.max_length for ids, _ in whole) else []
        for number, (conversation, origin) in enumerate(zip(conversations, origins, strict=True)):
            length = len(whole[number][0])
            is_long = length > self.max_length
            if is_long and self.too_long == "error":
                raise DataError(
                    f"{origin}: the row has {length} tokens and data.max_length is {self.max_length}"
                    " (data.too_long=error)"
                )
            if is_long and self.too_long == "drop":
                yield None, True
                continue
            ids, types = (cut if is_long else whole)[number]
            try:
                yield self._row(ids, types, self.labelling.target(label_of(conversation))), is_long
            except BadRow as bad:
                yield bad, is_long

    def sample(self, conversation: Conversation) -> Sample:
        """A row for a person: its texts, its label, and the tokens that the model judges it by."""
        ids, types = self._encode([conversation], truncate=True)[0]
        target = self.labelling.target(label_of(conversation))
        name = self.labelling.names[int(target)] if self.labelling.names else label_of(conversation)
        return Sample(SEPARATOR.join(_texts(conversation)), name, ids, types or [])

    def _row(self, ids: list[int], types: list[int] | None, target: float) -> Row:
        if not ids:
            raise BadRow("the text is empty: no token is left of it")
        tokens = np.array(ids, np.int32)
        return Row(
            tokens,
            np.full(len(ids), IGNORE, np.int32),
            self.labelling.dtype(target),
            None if types is None else np.array(types, np.int8),
        )

    def _encode(
        self, conversations: Sequence[Conversation], *, truncate: bool
    ) -> list[tuple[list[int], list[int] | None]]:
        """Ids and, where the model reads them, token types of each row."""
        texts = [_texts(conversation) for conversation in conversations]
        paired = [len(parts) > 1 for parts in texts]
        result: dict[int, tuple[list[int], list[int] | None]] = {}
        for pair in {*paired}:  # a pair is encoded otherwise than one text
            places = [i for i, value in enumerate(paired) if value == pair]
            columns = list(zip(*(texts[i] for i in places), strict=True))
            with _untouched(self.tokenizer):
                encoded = self.tokenizer(
                    *(list(column) for column in columns),
                    truncation="longest_first" if truncate else False,
                    max_length=self.max_length if truncate else None,
                    return_token_type_ids=self.labelling.segments,
                    return_attention_mask=False,
                    verbose=False,
                )
            types = encoded["token_type_ids"] if self.labelling.segments else [None] * len(places)
            result |= {i: (ids, kinds) for i, ids, kinds in zip(places, encoded["input_ids"], types, strict=True)}
        return [result[i] for i in range(len(texts))]


def _texts(conversation: Conversation) -> tuple[str, ...]:
    """The text of a labelled row, or both texts of a pair."""
    turn = conversation.turns[0]
    return (turn.text, turn.context) if turn.context else (turn.text,)


@contextmanager
def _untouched(tokenizer: Any) -> Iterator[None]:
    """Give a fast tokenizer its settings of truncation and padding back: they would be saved with it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = (backend.truncation, backend.padding) if backend is not None else (None, None)
    try:
        yield
    finally:
        if backend is not None:
            backend.enable_truncation(**before[0]) if before[0] else backend.no_truncation()
            backend.enable_padding(**before[1]) if before[1] else backend.no_padding()

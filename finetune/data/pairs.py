"""Rows of an encoder and its decoder on their way to tokens: what is read, and what is written about it.

No chat template: such models are pretrained without one. What is read is all that comes before the answer, a system
text, a prompt or an instruction with its input, an empty line between them; both sides are encoded as the tokenizer
itself encodes a text, and an answer that does not end in EOS then gets one, so that the model learns to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.config import DataConfig
from finetune.data.conversation import BadRow, Conversation
from finetune.data.rows import IGNORE, Row
from finetune.data.samples import Sample
from finetune.errors import ConfigError, DataError

BETWEEN = "\n\n"
"""Between the parts of what is read."""


def check_pairs(config: DataConfig, objective: str) -> None:
    """Refuse settings that do not go with rows of an encoder and a decoder.

    Raises:
        ConfigError: naming the setting.
    """
    if config.packing:
        raise ConfigError(
            f"data.packing=true conflicts with objective={objective}: an encoder reads every row by itself; set it to"
            " false"
        )
    if config.too_long == "split":
        raise ConfigError(
            f"data.too_long=split conflicts with objective={objective}: an answer belongs to the whole of what is read;"
            " set it to truncate, drop or error"
        )
    if config.chat_template != "auto":
        raise ConfigError(
            f"data.chat_template={config.chat_template} conflicts with objective={objective}, which reads rows without"
            " one: leave it out"
        )


@dataclass(frozen=True)
class PairEncoder:
    """Tokenizes rows with one answer.

    Attributes:
        tokenizer: of transformers; left unchanged.
        max_length: tokens of each side.
        too_long: truncate | drop | error.
    """

    tokenizer: Any
    max_length: int
    too_long: str

    def rows(
        self, conversations: Sequence[Conversation], origins: Sequence[str]
    ) -> Iterator[tuple[Row | BadRow | None, bool]]:
        """For each row its tokens, the fault that it has, or None where it is too long and dropped; and whether it is.

        Raises:
            DataError: for a row that is too long where `too_long` is error.
        """
        for conversation, origin in zip(conversations, origins, strict=True):
            try:
                source, target = self._encode(conversation)
            except BadRow as bad:
                yield bad, False
                continue
            longest = max(len(source), len(target))
            is_long = longest > self.max_length
            if is_long and self.too_long == "error":
                raise DataError(
                    f"{origin}: a side of the row has {longest} tokens and data.max_length is {self.max_length}"
                    " (data.too_long=error)"
                )
            if is_long and self.too_long == "drop":
                yield None, True
                continue
            source, target = self._cut(source), self._cut(target)
            ids = np.array([*source, *target], np.int32)
            labels = np.array([IGNORE] * len(source) + target, np.int32)
            yield Row(ids, labels, source=len(source)), is_long

    def sample(self, conversation: Conversation) -> Sample:
        """A row for a person: what is read, its answer, and the tokens that the model writes it by."""
        source, answer = _texts(conversation)
        return Sample(source, answer, self._cut(self.tokenizer(source)["input_ids"]))

    def _cut(self, ids: list[int]) -> list[int]:
        """At most `max_length` tokens; an end of sequence stays the last one."""
        if len(ids) <= self.max_length:
            return ids
        end = [ids[-1]] if ids[-1] == self.tokenizer.eos_token_id else []
        return [*ids[: self.max_length - len(end)], *end]

    def _encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        source, answer = _texts(conversation)
        read = self.tokenizer(source, verbose=False)["input_ids"]
        written = list(self.tokenizer(text_target=answer, verbose=False)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if eos is not None and written[-1:] != [eos]:
            written.append(eos)
        if not read:
            raise BadRow("no token is left of what is to be read")
        return list(read), written


def _texts(conversation: Conversation) -> tuple[str, str]:
    """What is read, and what is written.

    Raises:
        BadRow: for a row without a prompt, or with more than one answer.
    """
    learnt = [turn for turn in conversation.turns if turn.learn]
    if len(learnt) != 1 or not conversation.turns[-1].learn:
        raise BadRow(f"has {len(learnt)} answers to learn: a decoder beside an encoder learns one, the last turn")
    parts = [part for turn in conversation.turns[:-1] for part in (turn.text, turn.context) if part]
    if not parts:
        raise BadRow("has nothing to read before its answer: an encoder and its decoder need a prompt and an answer")
    return BETWEEN.join(parts), conversation.turns[-1].text

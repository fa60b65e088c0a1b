"""Where in the text each token stands, made right for tokenizers that get it wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.errors import DataError


@dataclass(frozen=True)
class Tokens:
    """A tokenized text: ids, and of each token the characters [start, end) it stands for (none: start = end)."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class OffsetTokenizer:
    """Tokenizes texts with character offsets.

    Two faults of tokenizers are made good. A tokenizer without byte tokens may pass over a character that it does not
    know and count the offsets behind it as if it had never been there. And one that trims white space from offsets
    leaves a token of white space alone with none.

    Args:
        tokenizer: a fast tokenizer of transformers: one that gives offsets.

    Raises:
        DataError: for a tokenizer without offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"the tokenizer ({type(tokenizer).__name__}) gives no character offsets, which labels are placed by: "
                "save it as a fast one (a tokenizer.json)"
            )
        self.tokenizer = tokenizer
        self._passed_over: dict[str, bool] = {}
        added = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")  # (?!) matches nothing

    def __call__(self, texts: Sequence[str], add_special_tokens: bool) -> list[Tokens]:
        """Tokenize texts at once, in their order; never truncated.

        Args:
            texts: to tokenize.
            add_special_tokens: whether the tokenizer puts its own around each text.
        """
        all_ids, all_offsets = self._raw(texts, add_special_tokens)
        kept = {i: places for i, text in enumerate(texts) if (places := self._kept(text)) is not None}
        if kept:
            shorter = ["".join(texts[i][place] for place in places) for i, places in kept.items()]
            for i, ids, offsets in zip(kept, *self._raw(shorter, add_special_tokens), strict=True):
                if ids == all_ids[i]:
                    all_offsets[i] = _moved(offsets, kept[i])
        return [_with_trimmed_space(ids, offsets) for ids, offsets in zip(all_ids, all_offsets, strict=True)]

    def _raw(self, texts: Sequence[str], add_special_tokens: bool) -> tuple[list[list[int]], list[np.ndarray]]:
        tokens = self.tokenizer(
            list(texts), add_special_tokens=add_special_tokens, return_offsets_mapping=True,
            return_attention_mask=False, return_token_type_ids=False, truncation=False, padding=False, verbose=False,
        )  # fmt: skip
        return tokens["input_ids"], [np.asarray(item, np.int64).reshape(-1, 2) for item in tokens["offset_mapping"]]

    def _kept(self, text: str) -> np.ndarray | None:
        """Places of the characters that the tokenizer does not pass over; None where it passes over none."""
        characters = set(text)
        for character in characters - self._passed_over.keys():
            between, without = self._raw([f"a{character}a", "aa"], False)[0]
            self._passed_over[character] = between == without
        gone = {character for character in characters if self._passed_over[character]}
        if not gone:
            return None
        kept = np.array([character not in gone for character in text])
        for match in self._added.finditer(text):  # found as a whole, whatever its characters are
            kept[match.start() : match.end()] = True
        return np.flatnonzero(kept)


def _moved(offsets: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Offsets in the text from offsets among the characters that were kept of it."""
    filled = offsets[:, 1] > offsets[:, 0]
    moved = np.zeros_like(offsets)
    moved[filled, 0] = kept[offsets[filled, 0]]
    moved[filled, 1] = kept[offsets[filled, 1] - 1] + 1
    return moved


def _with_trimmed_space(ids: list[int], offsets: np.ndarray) -> Tokens:
    """The tokens; one without characters gets those between its neighbours, if there are any."""
    starts, ends = offsets.T
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    return Tokens(np.asarray(ids, np.int32), np.where(starts == ends, np.minimum(before, starts), starts), ends)

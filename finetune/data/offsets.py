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
        return [
            self._repaired(text, ids, offsets, add_special_tokens)
            for text, ids, offsets in zip(texts, *self._raw(texts, add_special_tokens), strict=True)
        ]

    def _raw(self, texts: Sequence[str], add_special_tokens: bool) -> tuple[list[list[int]], list[np.ndarray]]:
        tokens = self.tokenizer(
            list(texts), add_special_tokens=add_special_tokens, return_offsets_mapping=True,
            return_attention_mask=False, return_token_type_ids=False, truncation=False, padding=False, verbose=False,
        )  # fmt: skip
        return tokens["input_ids"], [np.asarray(item, np.int64).reshape(-1, 2) for item in tokens["offset_mapping"]]

    def _repaired(self, text: str, ids: list[int], offsets: np.ndarray, add_special_tokens: bool) -> Tokens:
        kept = self._kept(text)
        if len(kept) < len(text):
            shorter = "".join(text[i] for i in kept)
            short_ids, short_offsets = self._raw([shorter], add_special_tokens)
            moved = short_offsets[0]
            if short_ids[0] == ids:  # then its offsets, which are right, say where the tokens stand among what was kept
                filled = moved[:, 1] > moved[:, 0]
                offsets = np.where(filled[:, None], 0, moved)
                offsets[filled, 0] = kept[moved[filled, 0]]
                offsets[filled, 1] = kept[moved[filled, 1] - 1] + 1
        starts, ends = offsets.T
        before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
        starts = np.where(starts == ends, np.minimum(before, starts), starts)
        return Tokens(np.asarray(ids, np.int32), starts, ends)

    def _kept(self, text: str) -> np.ndarray:
        """Places of the characters that the tokenizer does not pass over."""
        for character in set(text) - self._passed_over.keys():
            between, without = self._raw([f"a{character}a", "aa"], False)[0]
            self._passed_over[character] = between == without
        kept = np.ones(len(text), bool)
        if any(self._passed_over[character] for character in set(text)):
            kept[:] = [not self._passed_over[character] for character in text]
            for match in self._added.finditer(text):  # found as a whole, whatever its characters are
                kept[match.start() : match.end()] = True
        return np.flatnonzero(kept)

"""From text with learnt spans to token ids and labels.

The whole text is tokenized once, and a token is learnt when it overlaps a learnt span: by character offsets, never by
counting the tokens of a prompt, because the tokens of a prompt need not be a prefix of the tokens of the whole (a
token may straddle the border). A straddling token is learnt: it carries the first characters of the answer, and
without it they would never be learnt.

Every row ends with EOS, learnt, where the tokenizer has one. Labels are set by position, so it does not matter whether
the padding token is the same. The first token of a row is never learnt: nothing precedes it to predict it from.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.conversation import BadRow
from finetune.data.rows import IGNORE, Row
from finetune.data.templates import Rendered
from finetune.errors import DataError


@dataclass
class Encoded:
    """A tokenized row, or the reason why there is none."""

    row: Row | None
    straddles: bool = False
    fault: str = ""


class Masker:
    """Tokenizes rendered conversations and labels them.

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
        self._vanishes: dict[str, bool] = {}

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokenize a chunk of rows at once; the result is in their order."""
        results: list[Encoded | None] = [None] * len(rendered)
        for templated in (True, False):
            places = [i for i, item in enumerate(rendered) if item.templated == templated]
            if not places:
                continue
            shown = [self._visible(rendered[i]) for i in places]
            tokens = self.tokenizer(
                [text for text, _ in shown], add_special_tokens=not templated, return_offsets_mapping=True,
                return_attention_mask=False, return_token_type_ids=False, truncation=False, verbose=False,
            )  # fmt: skip
            for place, (text, spans), ids, offsets in zip(
                places, shown, tokens["input_ids"], tokens["offset_mapping"], strict=True
            ):
                try:
                    results[place] = self._label(len(text), spans, ids, offsets)
                except BadRow as bad:
                    results[place] = Encoded(None, fault=str(bad))
        return [result for result in results if result is not None]

    def _visible(self, rendered: Rendered) -> tuple[str, list[tuple[int, int]]]:
        """The text without the characters that the tokenizer passes over, and the spans in it.

        A tokenizer without byte tokens may drop a character that it does not know and count the offsets behind it as
        if it had never been there. The token ids are the same without it; the offsets are right.
        """
        text = rendered.text
        for character in set(text) - self._vanishes.keys():
            ids = self.tokenizer([f"a{character}a", "aa"], add_special_tokens=False)["input_ids"]
            self._vanishes[character] = ids[0] == ids[1]
        gone = [i for i, character in enumerate(text) if self._vanishes[character]] if self._any_vanish(text) else []
        if not gone:
            return text, list(rendered.spans)
        kept = "".join(character for character in text if not self._vanishes[character])
        return kept, [(start - bisect_left(gone, start), end - bisect_left(gone, end)) for start, end in rendered.spans]

    def _any_vanish(self, text: str) -> bool:
        return any(self._vanishes[character] for character in set(text))

    def _label(
        self, length: int, spans: list[tuple[int, int]], ids: list[int], offsets: list[tuple[int, int]]
    ) -> Encoded:
        tokens = np.asarray(ids, np.int32)
        starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        bos = self.tokenizer.bos_token_id
        if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:  # the text brought its own
            tokens, starts, ends = tokens[1:], starts[1:], ends[1:]
        starts = _with_trimmed_space(starts, ends)
        real = ends > starts
        if (np.diff(starts[real]) < 0).any() or (ends > length).any():
            raise BadRow("the tokenizer's character offsets are out of order, so that what is learnt cannot be placed")
        learn = np.zeros(len(tokens), bool)
        straddles = False
        for start, end in spans:
            learn |= real & (starts < end) & (ends > start)
            straddles |= bool((real & (starts < start) & (ends > start)).any())
        if not learn.any():
            raise BadRow("nothing to learn: no token of its answers is left")
        tokens, learn = self._end(tokens, learn)
        learn[0] = False
        if not learn.any():
            raise BadRow("nothing to learn: its one token has nothing before it to be predicted from")
        return Encoded(Row(tokens, np.where(learn, tokens, IGNORE).astype(np.int32)), straddles)

    def _end(self, tokens: np.ndarray, learn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut what follows the last answer, and have each answer's EOS learnt; append one where the last has none."""
        eos = self.tokenizer.eos_token_id
        last = int(np.flatnonzero(learn)[-1])
        if eos is None:
            return tokens[: last + 1], learn[: last + 1]
        is_eos = tokens == eos
        learn[1:] |= is_eos[1:] & learn[:-1]  # also where {% generation %} ends just before it
        later = np.flatnonzero(is_eos[last:])
        if len(later):
            stop = last + int(later[0])
            learn[last : stop + 1] = True
            return tokens[: stop + 1], learn[: stop + 1]
        return np.append(tokens[: last + 1], np.int32(eos)), np.append(learn[: last + 1], True)


def _with_trimmed_space(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Starts of tokens; one of white space alone, whose offsets some tokenizers trim to nothing, gets its own back."""
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    return np.where(starts == ends, np.minimum(before, starts), starts)


def show_mask(row: Row, tokenizer: Any) -> str:
    """The row as text with what is learnt between [[ and ]], for a person to look at."""
    learnt = row.labels != IGNORE
    borders = np.flatnonzero(np.diff(learnt)) + 1
    parts = []
    for piece in np.split(np.arange(len(learnt)), borders):
        text = tokenizer.decode(row.input_ids[piece].tolist())
        parts.append(f"[[{text}]]" if learnt[piece[0]] else text)
    return "".join(parts)

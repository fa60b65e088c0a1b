"""From text with learnt spans to token ids and labels.

The whole text is tokenized once, and a token is learnt when it overlaps a learnt span: by character offsets, never by
counting the tokens of a prompt, because the tokens of a prompt need not be a prefix of the tokens of the whole (a
token may straddle the border). A straddling token is learnt: it carries the first characters of the answer, and
without it they would never be learnt.

Every row ends with EOS, learnt, where the tokenizer has one. Labels are set by position, so it does not matter whether
the padding token is the same. The first token of a row is never learnt: nothing precedes it to predict it from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.conversation import BadRow
from finetune.data.offsets import OffsetTokenizer, Tokens
from finetune.data.rows import IGNORE, Row
from finetune.data.templates import Rendered


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
        self.tokenizer = tokenizer
        self._tokenize = OffsetTokenizer(tokenizer)

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokenize a chunk of rows at once; the result is in their order."""
        results: dict[int, Encoded] = {}
        for templated in (True, False):
            places = [i for i, item in enumerate(rendered) if item.templated == templated]
            texts = [rendered[i].text for i in places]
            for place, tokens in zip(places, self._tokenize(texts, not templated) if texts else [], strict=True):
                try:
                    results[place] = self._label(rendered[place], tokens)
                except BadRow as bad:
                    results[place] = Encoded(None, fault=str(bad))
        return [results[i] for i in range(len(rendered))]

    def _label(self, rendered: Rendered, tokens: Tokens) -> Encoded:
        ids, starts, ends = tokens.ids, tokens.starts, tokens.ends
        bos = self.tokenizer.bos_token_id
        if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:  # the text brought its own
            ids, starts, ends = ids[1:], starts[1:], ends[1:]
        real = ends > starts
        if (np.diff(starts[real]) < 0).any() or (ends > len(rendered.text)).any():
            raise BadRow("the tokenizer's character offsets are out of order, so that what is learnt cannot be placed")
        learn = np.zeros(len(ids), bool)
        straddles = False
        for start, end in rendered.spans:
            learn |= real & (starts < end) & (ends > start)
            straddles |= bool((real & (starts < start) & (ends > start)).any())
        if not learn.any():
            raise BadRow("nothing to learn: no token of its answers is left")
        ids, learn = self._end(ids, learn)
        learn[0] = False
        if not learn.any():
            raise BadRow("nothing to learn: its one token has nothing before it to be predicted from")
        return Encoded(Row(ids, np.where(learn, ids, IGNORE).astype(np.int32)), straddles)

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


def show_mask(row: Row, tokenizer: Any) -> str:
    """The row as text with what is learnt between [[ and ]], for a person to look at."""
    learnt = row.labels != IGNORE
    borders = np.flatnonzero(np.diff(learnt)) + 1
    parts = []
    for piece in np.split(np.arange(len(learnt)), borders):
        text = tokenizer.decode(row.input_ids[piece].tolist())
        parts.append(f"[[{text}]]" if learnt[piece[0]] else text)
    return "".join(parts)

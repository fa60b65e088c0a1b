"""Corpus BLEU over words, with several references.

Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation" (ACL), section 2: clipped
precisions of 1 to 4 words, their geometric mean, and the brevity penalty by the reference nearest in length.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

ORDERS = 4
WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words and signs."""
    return WORD.findall(text.lower())


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """BLEU of some candidates, each with its references, in [0, 1]; 0 where an order has no match at all."""
    matched, proposed = [0] * ORDERS, [0] * ORDERS
    length = nearest = 0
    for candidate, several in zip(candidates, references, strict=True):
        length += len(candidate)
        nearest += min((abs(len(one) - len(candidate)), len(one)) for one in several)[1]
        for n in range(1, ORDERS + 1):
            mine = _grams(candidate, n)
            most: Counter[tuple[str, ...]] = Counter()
            for one in several:
                most |= _grams(one, n)
            matched[n - 1] += (mine & most).total()
            proposed[n - 1] += mine.total()
    if not all(matched):
        return 0.0
    precision = sum(math.log(m / p) for m, p in zip(matched, proposed, strict=True)) / ORDERS
    return math.exp(precision + min(0.0, 1 - nearest / length))


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

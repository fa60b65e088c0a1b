"""Which rows are held out where no `data.eval` is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

SHARE = 0.02
LEAST, MOST = 16, 500


def held_out_count(rows: int) -> int:
    """How many rows are wanted: 2 %, at least 16 and at most 500, but never more than a quarter."""
    return min(max(round(SHARE * rows), LEAST), MOST, rows // 4 if rows >= 4 else rows // 2)


def held_out(prompts: Sequence[bytes], rows: Sequence[bytes]) -> list[int]:
    """Indices of the held-out rows, ascending.

    The choice depends on the rows' contents alone, not on their order, other files' names or a seed: rows are taken by
    the smallest digest, those with the same prompt together, so that no held-out prompt is learnt. Groups too large
    for what is wanted stay; where every row has the same prompt, equal rows are kept together instead.

    Args:
        prompts: digest of each row's prompt.
        rows: digest of each whole row.
    """
    wanted = held_out_count(len(rows))
    return _smallest(prompts, wanted) or _smallest(rows, wanted)


def _smallest(keys: Sequence[bytes], wanted: int) -> list[int]:
    sizes = Counter(keys)
    chosen: set[bytes] = set()
    count = 0
    for key in sorted(sizes):
        if count + sizes[key] <= wanted:
            chosen.add(key)
            count += sizes[key]
        if count == wanted:
            break
    return [i for i, key in enumerate(keys) if key in chosen]

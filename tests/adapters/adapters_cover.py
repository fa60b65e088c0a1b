"""A small set of combinations in which every pair of values meets: what `make test` runs of the whole product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

Combination = tuple[str, ...]


def pairs_of(combination: Combination) -> set[tuple[int, str, int, str]]:
    """Every two values of a combination, with their places."""
    placed = enumerate(combination)
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(placed, 2)}


def cover(factors: Sequence[Sequence[str]], allowed: Callable[[Combination], bool]) -> list[Combination]:
    """Allowed combinations that hold every pair that an allowed combination holds; the same ones every time.

    Greedy: the combination with most pairs not seen yet comes next, the first of equals.

    Args:
        factors: the values of each place.
        allowed: whether a whole combination makes sense.
    """
    left = {c: pairs_of(c) for c in product(factors, allowed)}
    waiting: set[tuple[int, str, int, str]] = set().union(*left.values())
    chosen = []
    most = len(factors) * (len(factors) - 1) // 2
    while waiting:
        best, gain = (), 0
        for combination, pairs in left.items():
            if (new := len(pairs & waiting)) > gain:
                best, gain = combination, new
            if gain == most:
                break
        most = gain  # no combination will ever bring more than the best one now
        chosen.append(best)
        waiting -= left.pop(best)
    return chosen


def product(factors: Sequence[Sequence[str]], allowed: Callable[[Combination], bool]) -> list[Combination]:
    """Every allowed combination."""
    return [c for c in itertools.product(*factors) if allowed(c)]

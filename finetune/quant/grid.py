"""Where the codes of a weight lie: what a storage format offers to whoever chooses codes (a rounder).

Shape suffixes: O out features (or any leading dimensions), I in features, C a run of columns.

A grid is fixed before the first code is chosen: its scales are already rounded to what is stored, so that a code is
nearest to what will be decoded. Columns can then be taken in any order, one after the other (GPTQ) or all at once (to
nearest), and no index of groups has to be stored. Where a rounder fits groups on the way, each is whole in its order.
"""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

from torch import Tensor


class Grid(Protocol):
    """The values that a format can store for each column of a weight.

    `FrozenWeight`s that store codes give theirs by `fit(weight)`, and take codes on it by `take(grid, codes)`.
    """

    def round_columns(self, w_OC: Tensor, first: int) -> Tensor:
        """The codes nearest to the columns from `first` on, in the format's own dtype, [.., O, C]."""
        ...

    def decode(self, codes_OC: Tensor, first: int = 0) -> Tensor:
        """The float32 weights of codes of the columns from `first` on."""
        ...

    def part(self, rows: slice) -> Self:
        """Of a grid over a matrix, the part of some of its rows, without a step."""
        ...

    def expert(self, number: int) -> Self:
        """Of a grid over a stack of experts, the part that belongs to one of them."""
        ...


@runtime_checkable
class Regrouped(Grid, Protocol):
    """A grid whose rows have several groups, each of which can be fitted anew while codes are chosen."""

    @property
    def group(self) -> int | None:
        """Columns of a group; None where that is a row, or where groups run over more than one row."""
        ...

    def refit(self, w_OC: Tensor, first: int) -> Self:
        """Of a grid over a matrix, the one whose group that begins at `first` spans these columns, float32."""
        ...

    def with_expert(self, number: int, part: Self) -> Self:
        """Of a grid over a stack of experts, the one that has this part for one of them."""
        ...

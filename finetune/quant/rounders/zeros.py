"""Weights that are zero stay zero, whatever chooses the codes.

Shape suffixes: O out features, I in features, C a run of columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.grid import Grid, Regrouped
from finetune.quant.packed import PackedWeight
from finetune.quant.rounders.base import Choice, Rounder

PROBE = (8, 4096)
"""Rows and columns of the weight that a format is tried on: whole groups of any size that formats offer."""


@dataclass(frozen=True)
class MaskedGrid:
    """A grid on which some weights can only be zero.

    Attributes:
        grid: what the others lie on.
        kept_OI: bool, false where a weight has to be zero.
    """

    grid: Grid
    kept_OI: Tensor

    def round_columns(self, w_OC: Tensor, first: int) -> Tensor:
        """The code of zero where nothing is kept, else the nearest one."""
        kept_OC = self.kept_OI[..., first : first + w_OC.shape[-1]]
        return self.grid.round_columns(torch.where(kept_OC, w_OC, 0), first)

    def decode(self, codes_OC: Tensor, first: int = 0) -> Tensor:
        """As the grid does."""
        return self.grid.decode(codes_OC, first)

    @property
    def group(self) -> int | None:
        """As the grid has it; None where its groups cannot be fitted anew."""
        return self.grid.group if isinstance(self.grid, Regrouped) else None

    def refit(self, w_OC: Tensor, first: int) -> Self:
        """The grid fitted to the weights that are kept."""
        assert isinstance(self.grid, Regrouped)
        kept_OC = self.kept_OI[:, first : first + w_OC.shape[1]]
        return replace(self, grid=self.grid.refit(torch.where(kept_OC, w_OC, 0), first))

    def with_expert(self, number: int, part: Self) -> Self:
        """The grid of a stack with another one for one of its experts."""
        assert isinstance(self.grid, Regrouped) and isinstance(part.grid, Regrouped)
        return replace(self, grid=self.grid.with_expert(number, part.grid))

    def part(self, rows: slice) -> Self:
        """The part of some rows of a matrix."""
        return replace(self, grid=self.grid.part(rows), kept_OI=self.kept_OI[rows])

    def expert(self, number: int) -> Self:
        """The part of one expert."""
        return replace(self, grid=self.grid.expert(number), kept_OI=self.kept_OI[number])


class ZerosKept(Rounder):
    """A rounder whose weights have to be zero where they are zero already: what a pruned weight is rounded by.

    Args:
        rounder: chooses the other codes; what it corrects for others' errors is never put on a zero.
    """

    def __init__(self, rounder: Rounder) -> None:
        self.rounder = rounder

    def fit(self, module: PackedWeight, weight: Tensor) -> Grid:
        return self.rounder.fit(module, weight)

    def choose(self, grid: Grid, w_OI: Tensor, gram_II: Tensor) -> Choice | None:
        choice = self.rounder.choose(MaskedGrid(grid, w_OI != 0), w_OI, gram_II)
        if choice is None or not isinstance(choice.grid, MaskedGrid):
            return choice
        return replace(choice, grid=choice.grid.grid)


@torch.no_grad()
def holds_zero(quant: QuantConfig) -> bool:
    """Whether a storage format has a code for exactly 0 whatever the other weights are, found by trying."""
    module = QUANTIZERS.build(quant, *PROBE, dtype=torch.float32, device="cpu")
    if not isinstance(module, PackedWeight):
        return True
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(PROBE, generator=generator) + torch.linspace(-9, 9, PROBE[0]).unsqueeze(1)
    w_OI[:, ::2] = 0
    grid = module.fit(w_OI)
    decoded_OI = grid.decode(grid.round_columns(w_OI, 0))
    module.store(w_OI)
    return not bool(decoded_OI[:, ::2].any() or module.decode(torch.float32)[:, ::2].any())

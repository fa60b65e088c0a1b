"""AWQ's search for ranges (Lin et al. 2023, arXiv:2306.00978; `auto_clip` of the authors' code).

The largest weight of a group sets the steps of all. Cutting it off costs its own error and makes the others' smaller:
for each group of each row, the share of its range is taken that leaves the least squared error of the output, as far as
it comes from the inputs of the group alone. Codes are then the nearest ones of the weights as they were.

Shape suffixes: O out features, C columns of a group, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.quant.base import QuantConfig
from finetune.quant.grid import Grid
from finetune.quant.packed import PackedWeight
from finetune.quant.rounders.base import Choice, Rounder

SHARES = tuple(1 - 0.05 * step for step in range(11))
"""Of the range that are tried, 1 to .5."""


class Clipping(Rounder):
    """Codes to nearest, on a grid whose ranges are searched; for one weight.

    Args:
        quant: whose groups are searched; a row where it has none.
        grams: of each of its matrices, sum of x x^T; None for one that saw no inputs, whose ranges stay.
    """

    def __init__(self, quant: QuantConfig, grams: Sequence[Tensor | None]) -> None:
        self.size = group_of(quant)
        self.grams = grams

    def fit(self, module: PackedWeight, weight: Tensor) -> Grid:
        w = weight.float()
        groups = w.split(self.size if self.size > 0 else w.shape[-1], dim=-1)
        most = [group.abs().amax(-1, keepdim=True) for group in groups]
        best: list[Tensor] = []
        chosen = list(groups)
        for share in SHARES:
            cut = [group.clamp(-share * top, share * top) for group, top in zip(groups, most, strict=True)]
            grid = module.fit(torch.cat(cut, dim=-1))
            errors = self._errors(grid.decode(grid.round_columns(w, 0)) - w)
            if not best:
                best = errors
                continue
            for number, error in enumerate(errors):
                better = error < best[number]
                best[number] = torch.where(better, error, best[number])
                chosen[number] = torch.where(better, cut[number], chosen[number])
        return module.fit(torch.cat(chosen, dim=-1))

    def choose(self, grid: Grid, w_OI: Tensor, gram_II: Tensor) -> Choice | None:
        return Choice(grid.round_columns(w_OI, 0))

    def _errors(self, delta: Tensor) -> list[Tensor]:
        """d H d^T for each row of each group of columns, [.., O, 1]."""
        found, first = [], 0
        for part in delta.split(self.size if self.size > 0 else delta.shape[-1], dim=-1):
            run = slice(first, first + part.shape[-1])
            first = run.stop
            matrices = part.unsqueeze(0) if part.dim() == 2 else part
            errors = [
                torch.zeros_like(d_OC[:, :1])
                if gram is None
                else ((d_OC @ gram[run, run].to(d_OC)) * d_OC).sum(-1, True)
                for d_OC, gram in zip(matrices, self.grams, strict=True)
            ]
            found.append(errors[0] if part.dim() == 2 else torch.stack(errors))
        return found


def group_of(quant: QuantConfig) -> int:
    """How many columns share a scale, by a format's settings; -1 where all of a row do."""
    return int(getattr(quant, "group_size", getattr(quant, "block_size", -1)))

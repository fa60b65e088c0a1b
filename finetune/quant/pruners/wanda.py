"""Wanda (Sun et al. 2023, arXiv:2306.11695, section 3): a weight counts as much as what it usually multiplies.

Shape suffixes: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from finetune.quant.grid import Grid
from finetune.quant.pruners.base import (
    PRUNERS,
    Pruned,
    Pruner,
    SparseConfig,
    keep_of_groups,
    keep_of_rows,
    seen,
)
from finetune.quant.pruners.magnitude import smallest_go


@dataclass
class WandaConfig(SparseConfig):
    """Settings of Wanda: sparsity and pattern."""

    needs_inputs: ClassVar[bool] = True

    name: str = "wanda"


@PRUNERS.register(WandaConfig)
class Wanda(Pruner):
    """|w_ij| ||x_j||_2, compared within each output; the weights that stay are left as they are."""

    def __init__(self, config: WandaConfig | None = None) -> None:
        self.config = config or WandaConfig()

    def prune(self, w_OI: Tensor, gram_II: Tensor | None, grid: Grid | None = None) -> Pruned:
        if gram_II is None or not seen(gram_II):
            return self.without_inputs(w_OI, grid)
        scores_OI = w_OI.abs() * gram_II.diagonal().clamp(min=0).sqrt()
        group = self.config.group
        kept_OI = keep_of_rows(scores_OI, self.config.share) if group is None else keep_of_groups(scores_OI, group)
        return Pruned(torch.where(kept_OI, w_OI, 0), kept_OI)

    def by_magnitude(self, w_OI: Tensor) -> Tensor:
        return smallest_go(w_OI, self.config, "row")

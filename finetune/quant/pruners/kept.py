"""The zeros of a base that was pruned before, when it is stored anew.

Shape suffixes: O out features, I in features.
"""

from __future__ import annotations

from torch import Tensor

from finetune.quant.grid import Grid
from finetune.quant.pruners.base import Pruned, Pruner


class Kept(Pruner):
    """Prunes what is zero already, and nothing else."""

    def prune(self, w_OI: Tensor, gram_II: Tensor | None, grid: Grid | None = None) -> Pruned:
        return Pruned(w_OI, self.by_magnitude(w_OI))

    def by_magnitude(self, w_OI: Tensor) -> Tensor:
        return w_OI != 0

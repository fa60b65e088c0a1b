"""Magnitude pruning (Han et al. 2015, arXiv:1506.02626): the smallest weights go, whatever they multiply.

Shape suffixes: O out features, I in features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.quant.grid import Grid
from finetune.quant.pruners.base import (
    PRUNERS,
    Pruned,
    Pruner,
    SparseConfig,
    keep_of_groups,
    keep_of_layer,
    keep_of_rows,
)

COMPARED = ("layer", "row")


@dataclass
class MagnitudeConfig(SparseConfig):
    """Settings of magnitude pruning.

    Attributes:
        compare: weights with all others of the layer (`layer`), or of the same output (`row`). N:M compares within
            each group.
    """

    name: str = "magnitude"
    compare: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare not in COMPARED:
            raise ConfigError(f"pruner.compare is {self.compare!r}: expected {' | '.join(COMPARED)}")


@PRUNERS.register(MagnitudeConfig)
class Magnitude(Pruner):
    """Needs no inputs and corrects nothing."""

    def __init__(self, config: MagnitudeConfig | None = None) -> None:
        self.config = config or MagnitudeConfig()

    def prune(self, w_OI: Tensor, gram_II: Tensor | None, grid: Grid | None = None) -> Pruned:
        kept_OI = self.by_magnitude(w_OI)
        return Pruned(torch.where(kept_OI, w_OI, 0), kept_OI)

    def by_magnitude(self, w_OI: Tensor) -> Tensor:
        return smallest_go(w_OI, self.config, self.config.compare)


def smallest_go(w_OI: Tensor, config: SparseConfig, compare: str) -> Tensor:
    """Which weights to keep by their magnitude."""
    if config.group is not None:
        return keep_of_groups(w_OI.abs(), config.group)
    return (keep_of_layer if compare == "layer" else keep_of_rows)(w_OI.abs(), config.share)

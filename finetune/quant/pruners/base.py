"""What every pruner offers: weights to set to zero, at a sparsity or N of every M, and what becomes of the others.

Shape suffixes: O out features, I in features, M columns of a group, G groups.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.quant.grid import Grid
from finetune.quant.rounders.base import CalibratorConfig
from finetune.quant.rounders.zeros import MaskedGrid
from finetune.registry import Registry

DEFAULT_SPARSITY = 0.5
MOST_COLUMNS = 128
"""Largest M: columns that SparseGPT corrects one by one."""
UNSEEN = "saw no inputs: pruned by magnitude"


@dataclass
class PrunerConfig:
    """Which weights are set to zero. Sub-classes are registered in `PRUNERS`, one a method.

    Attributes:
        prunes: whether it sets anything to zero.
        cuts: whether it takes whole parts out, so that a smaller model is left.
        needs_inputs: whether it cannot work without calibration data.
    """

    prunes: ClassVar[bool] = False
    cuts: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False

    name: str = "base"

    def check_calibrator(self, calibrator: CalibratorConfig) -> None:
        """Refuse a rounder that cannot work beside this pruner.

        Raises:
            ConfigError: naming both.
        """


PRUNERS: Registry[PrunerConfig] = Registry("pruner", "finetune.quant.pruners")
"""`PRUNERS.build(config)` returns a `Pruner`, a `Cut` (cut.py) where `config.cuts`, None where nothing is pruned."""


@dataclass
class SparseConfig(PrunerConfig):
    """How many weights are set to zero, and in which pattern.

    Attributes:
        sparsity: share of the weights of a layer; null is what the pattern says, and 0.5 without one.
        pattern: "N:M" sets exactly N of every M consecutive inputs of each output to zero ("2:4", "4:8"; SparseGPT's
            way to say it); null leaves the choice free.
    """

    prunes: ClassVar[bool] = True

    sparsity: float | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ConfigError(f"pruner.sparsity is {self.sparsity}: expected a share above 0 and below 1")
        group = self.group
        if group is not None and self.sparsity is not None and abs(self.sparsity - group[0] / group[1]) > 1e-9:
            raise ConfigError(
                f"pruner.sparsity is {self.sparsity}, but pruner.pattern={self.pattern} is {group[0] / group[1]:g}:"
                " leave one of them out"
            )

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M of the pattern.

        Raises:
            ConfigError: for anything else than N:M.
        """
        if self.pattern is None:
            return None
        match = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        n, m = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 0 < n < m <= MOST_COLUMNS:
            raise ConfigError(
                f"pruner.pattern is {self.pattern!r}: expected N:M with 0 < N < M <= {MOST_COLUMNS}, as in"
                " pruner.pattern=2:4 (in quotes in YAML), or null"
            )
        return n, m

    @property
    def share(self) -> float:
        """Share of the weights that are set to zero."""
        if self.group is not None:
            return self.group[0] / self.group[1]
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity


@dataclass(frozen=True)
class Pruned:
    """What became of one matrix.

    Attributes:
        w_OI: float32, zero where nothing is kept.
        kept_OI: bool.
        codes_OI: of `w_OI` on the grid, from a pruner that was given one and chooses codes.
        damping: as in `rounders.base.Choice`.
        note: what the user should know, empty for nothing.
    """

    w_OI: Tensor
    kept_OI: Tensor
    codes_OI: Tensor | None = None
    damping: float | None = None
    note: str = ""


class Pruner(ABC):
    """Sets weights of one matrix after the other to zero.

    Attributes:
        chooses_codes: whether it takes the rounder's place where the format has codes.
    """

    chooses_codes: ClassVar[bool] = False

    @abstractmethod
    def prune(self, w_OI: Tensor, gram_II: Tensor | None, grid: Grid | None = None) -> Pruned:
        """Prune a matrix.

        Args:
            w_OI: float32; left as it is.
            gram_II: sum of x x^T over the inputs, float32, on the same device; None, or all zero, where it saw none.
            grid: of the codes; only for a pruner that chooses them.
        """

    @abstractmethod
    def by_magnitude(self, w_OI: Tensor) -> Tensor:
        """Which weights to keep of a matrix, as many and in the same pattern, by nothing but their own size."""

    def without_inputs(self, w_OI: Tensor, grid: Grid | None, note: str = UNSEEN) -> Pruned:
        """A matrix whose inputs teach nothing."""
        kept_OI = self.by_magnitude(w_OI)
        pruned_OI = torch.where(kept_OI, w_OI, 0)
        if grid is None:
            return Pruned(pruned_OI, kept_OI, note=note)
        codes_OI = MaskedGrid(grid, kept_OI).round_columns(w_OI, 0)
        return Pruned(grid.decode(codes_OI), kept_OI, codes_OI, note=note)


def seen(gram_II: Tensor | None) -> bool:
    """Whether inputs were seen that were not all zero."""
    return gram_II is not None and bool((gram_II.diagonal() > 0).any())


def count(weights: int, share: float) -> int:
    """How many of some weights are set to zero: never more than was asked for. (The published codes for SparseGPT
    and magnitude take the threshold itself too, one more.)"""
    return int(weights * share + 1e-6)


def keep_largest(scores: Tensor, zeros: int) -> Tensor:
    """False for exactly so many of the smallest along the last dimension."""
    smallest = scores.topk(zeros, dim=-1, largest=False, sorted=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, smallest, False)


def keep_of_layer(scores_OI: Tensor, share: float) -> Tensor:
    """Compared with all weights of the layer."""
    kept = keep_largest(scores_OI.flatten(), count(scores_OI.numel(), share))
    return kept.view_as(scores_OI)


def keep_of_rows(scores_OI: Tensor, share: float) -> Tensor:
    """Compared with the weights of the same output."""
    return keep_largest(scores_OI, count(scores_OI.shape[-1], share))


def keep_of_groups(scores_OI: Tensor, group: tuple[int, int]) -> Tensor:
    """Exactly N of every M consecutive inputs go."""
    zeros, size = group
    return keep_largest(scores_OI.unflatten(-1, (-1, size)), zeros).flatten(-2)

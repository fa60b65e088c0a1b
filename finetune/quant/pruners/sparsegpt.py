"""SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): prune what costs least; later columns make it good.

The sweep is GPTQ's (quant/rounders/gptq.py), on the same Hessian and with the same damping. What goes is chosen on the
way, from the weights as corrected so far, by the error that the optimal brain surgeon predicts, w^2 / [U_jj]^2 (section
3.2): for 128 columns at once and all outputs together, or N of every M columns for each output. Where the weights are
to be codes, those kept are rounded in the same sweep, so that one correction serves both (section 3.5). Columns are
taken in order, as patterns are.

An input that was zero in all samples makes its column cost nothing, so that it goes first.

Shape suffixes: O out features, I in features, C a run of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.quant.grid import Grid
from finetune.quant.pruners.base import (
    PRUNERS,
    Pruned,
    Pruner,
    SparseConfig,
    count,
    keep_largest,
    seen,
)
from finetune.quant.pruners.magnitude import smallest_go
from finetune.quant.rounders.base import CalibratorConfig
from finetune.quant.rounders.gptq import COLUMNS, alive, inverse_factor, sweep
from finetune.quant.rounders.zeros import MaskedGrid

BESIDE = ("rtn", "gptq")
"""Rounders that it stands in for. Of the second, `calibrator.mse` is honoured; columns are taken in order, and groups
are fixed beforehand."""


@dataclass
class SparseGPTConfig(SparseConfig):
    """Settings of SparseGPT.

    Attributes:
        damping: as GPTQ's: share of the mean diagonal of H that is added to its diagonal; tenfold, then a hundredfold,
            where H is not positive definite in float32, which is reported.
    """

    needs_inputs: ClassVar[bool] = True

    name: str = "sparsegpt"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise ConfigError(f"pruner.damping is {self.damping}: expected a share above 0, at most 1")

    def check_calibrator(self, calibrator: CalibratorConfig) -> None:
        if calibrator.name not in BESIDE:
            raise ConfigError(
                f"pruner=sparsegpt chooses the codes itself, in GPTQ's sweep, so calibrator={calibrator.name} has no"
                f" say: expected {' or '.join(f'calibrator={name}' for name in BESIDE)}"
            )


@PRUNERS.register(SparseGPTConfig)
class SparseGPT(Pruner):
    """Mask, corrections and codes of a matrix in one sweep."""

    chooses_codes: ClassVar[bool] = True

    def __init__(self, config: SparseGPTConfig | None = None) -> None:
        self.config = config or SparseGPTConfig()

    def prune(self, w_OI: Tensor, gram_II: Tensor | None, grid: Grid | None = None) -> Pruned:
        if gram_II is None or not seen(gram_II):
            return self.without_inputs(w_OI, grid)
        factor_II, damping = inverse_factor(alive(gram_II), self.config.damping)
        if factor_II is None:
            return self.without_inputs(w_OI, grid, f"H is singular up to damping {damping:g}: pruned by magnitude")
        note = f"H needed damping {damping:g}" if damping != self.config.damping else ""
        return _Sweep(self.config, w_OI, factor_II, gram_II.diagonal() > 0, grid).go(damping, note)

    def by_magnitude(self, w_OI: Tensor) -> Tensor:
        return smallest_go(w_OI, self.config, "layer")


class _Sweep:
    """One matrix on its way.

    Args:
        factor_II: upper Cholesky factor of the inverse of H.
        alive_I: inputs that were ever other than zero.
        grid: of the codes; None leaves the weights as corrected.
    """

    def __init__(
        self, config: SparseGPTConfig, w_OI: Tensor, factor_II: Tensor, alive_I: Tensor, grid: Grid | None
    ) -> None:
        self.config, self.factor_II, self.grid = config, factor_II, grid
        # A column then lies in one piece; always a copy, also of what is laid out so already.
        self.w_IO = w_OI.T.clone(memory_format=torch.contiguous_format)
        self.kept_IO = torch.ones_like(self.w_IO, dtype=torch.bool)
        self.weight_I = alive_I / factor_II.diagonal()
        self.gone = 0
        self.codes: list[Tensor] = []
        group = config.group
        self.stride = COLUMNS if group is None else group[1]
        self.columns = COLUMNS // self.stride * self.stride  # a group is chosen from weights that are up to date

    def go(self, damping: float, note: str) -> Pruned:
        """All columns."""
        sweep(self.w_IO, self.factor_II, self._settle, self.columns)
        codes_OI = torch.cat(self.codes, dim=1) if self.grid is not None else None
        return Pruned(self.w_IO.T.contiguous(), self.kept_IO.T.contiguous(), codes_OI, damping, note)

    def _settle(self, place: int) -> Tensor:
        """A column with its zeros; on the grid where there is one."""
        if place % self.stride == 0:
            self._choose(place, min(place + self.stride, len(self.w_IO)))
        kept_O, value_O = self.kept_IO[place], self.w_IO[place]
        if self.grid is None:
            return torch.where(kept_O, value_O, 0)
        masked = MaskedGrid(self.grid, self.kept_IO.T)
        self.codes.append(masked.round_columns(value_O.unsqueeze(1), place))
        return masked.decode(self.codes[-1], place).squeeze(1)

    def _choose(self, start: int, end: int) -> None:
        """Which weights of some columns are kept."""
        scores_CO = (self.w_IO[start:end] * self.weight_I[start:end].unsqueeze(1)).square()
        group = self.config.group
        if group is not None:
            self.kept_IO[start:end] = keep_largest(scores_CO.T, group[0]).T
            return
        # As many as the share of all columns so far: what rounding left out of one block goes in the next.
        zeros = count(end * scores_CO.shape[1], self.config.share) - self.gone
        self.kept_IO[start:end] = keep_largest(scores_CO.flatten(), zeros).view_as(scores_CO)
        self.gone += zeros

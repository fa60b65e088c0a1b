"""Which units of one matrix stay, and what becomes of their columns; a unit is as in slices.py.

Shape suffixes: O out features, I in features, U units, K units that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.quant.pruners import groups
from finetune.quant.pruners.cut import CutConfig
from finetune.quant.rounders.base import squared

CHOICES = ("loss", "activation", "magnitude")


@dataclass
class NarrowConfig(CutConfig):
    """How units are chosen, and what becomes of the others.

    Attributes:
        choice: what decides: `loss`, the error that is left once the others are fitted anew; `activation`, the error of
            leaving each out, nothing else changed; `magnitude`, the size of its weights.
        refit: fit the columns that stay.
        damping: share of the mean diagonal of H that is added to it; tenfold, then a hundredfold, where H is not
            positive definite in float32, which is reported.
    """

    choice: str = "loss"
    refit: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choice not in CHOICES:
            raise ConfigError(f"pruner.choice is {self.choice!r}: expected {' | '.join(CHOICES)}")
        if not 0 < self.damping <= 1:
            raise ConfigError(f"pruner.damping is {self.damping}: expected a share above 0, at most 1")


@dataclass(frozen=True)
class Chosen:
    """What stays of one matrix.

    Attributes:
        kept_K: units, in order.
        weight_OI: the columns that stay, as they will be, float32.
        shift_O: what its bias changes by; None where it has none, or nothing was fitted.
        error: relative squared error of its output.
        error_magnitude: the same where the largest units stay and nothing is fitted.
        damping: share that was needed; None where H was not looked at.
        note: what the user should know, empty for nothing.
    """

    kept_K: Tensor
    weight_OI: Tensor
    shift_O: Tensor | None
    error: float
    error_magnitude: float
    damping: float | None
    note: str


def choose(settings: NarrowConfig, w_OI: Tensor, matrix_II: Tensor | None, sizes_U: Tensor, stay: int) -> Chosen:
    """Choose and fit one matrix.

    Args:
        w_OI: float32.
        matrix_II: second moment of its inputs, float32, one larger where a constant stands behind them for its bias;
            None where it saw none.
        sizes_U: sum of squares of all weights of each unit.
        stay: how many do.
    """
    width, size = w_OI.shape[1], w_OI.shape[1] // len(sizes_U)
    largest_K = _largest(sizes_U, stay)
    if matrix_II is None:
        columns = groups.columns_of(largest_K, size)
        return Chosen(largest_K, w_OI[:, columns], None, 0.0, 0.0, None, "saw no inputs: chosen by size")
    inputs_II = matrix_II[:width, :width]
    factor_II, damping = groups.factor(matrix_II, settings.damping)
    note = f"H needed damping {damping:g}" if damping != settings.damping else ""
    if factor_II is None:
        kept_K, note = largest_K, f"H is singular up to damping {damping:g}: chosen by size"
    elif settings.choice == "magnitude":
        kept_K = largest_K
    elif settings.choice == "activation":
        kept_K = _largest(groups.alone(w_OI, inputs_II, size), stay)
    else:
        inverse_II = torch.cholesky_inverse(factor_II, out=factor_II)[:width, :width].contiguous()
        live_OI = w_OI * (inputs_II.diagonal() > 0)  # what was never there costs nothing
        gone_U = groups.cheapest(live_OI, inverse_II, size, len(sizes_U) - stay)
        del inverse_II
        here_U = torch.ones(len(sizes_U), dtype=torch.bool, device=w_OI.device).index_fill_(0, gone_U, False)
        kept_K = here_U.nonzero().flatten()
    columns = groups.columns_of(kept_K, size)
    new_OI, shift_O = w_OI[:, columns], None
    if settings.refit and factor_II is not None:
        behind = torch.arange(width, len(matrix_II), device=w_OI.device)
        whole_OI = torch.cat([w_OI, w_OI.new_zeros(len(w_OI), len(behind))], dim=1)
        fitted_OI = groups.refit(whole_OI, matrix_II, torch.cat([columns, behind]), damping)
        new_OI, shift_O = fitted_OI[:, : len(columns)], fitted_OI[:, -1] if len(behind) else None
    plain = groups.columns_of(largest_K, size)
    return Chosen(
        kept_K,
        new_OI,
        shift_O,
        _error(w_OI, matrix_II, columns, new_OI, shift_O),
        _error(w_OI, matrix_II, plain, w_OI[:, plain], None),
        damping,
        note,
    )


def _largest(scores_U: Tensor, stay: int) -> Tensor:
    """The units that stay, in order."""
    return scores_U.topk(stay).indices.sort().values


def _error(w_OI: Tensor, matrix_II: Tensor, columns: Tensor, new_OI: Tensor, shift_O: Tensor | None) -> float:
    """Squared error of the output, relative to the output without its bias."""
    width = w_OI.shape[1]
    energy = squared(w_OI, matrix_II[:width, :width])
    off_OI = w_OI.new_zeros(len(w_OI), len(matrix_II))
    off_OI[:, :width] = w_OI
    off_OI[:, columns] -= new_OI
    if shift_O is not None:
        off_OI[:, width] = -shift_O
    return max(0.0, squared(off_OI, matrix_II)) / energy if energy > 0 else 0.0

"""GPTQ (Frantar et al. 2022, arXiv:2210.17323, section 3): later columns make good the error of each one.

Over any grid: affine integers, NF4 and FP4, llama.cpp's blocks, rows of integers. It is fixed from the weight as it
was, before the first code is chosen, with its scales as they will be stored ("static groups"). So columns may be taken
in any order (`act_order`) and no index of groups is needed to decode.

With `static_groups=false` the range of a group is fitted when its first column is reached, to what the columns before
have made of its weights (the paper's section 4 and its authors' code). An order by energy then is one of groups, and of
columns within each (GPTQModel's "group-aware" act-order), so that there is no index either.

An input that was zero in all samples teaches nothing about its column, which is rounded to nearest. (The paper's code
sets it to zero, which the first input that is not zero would miss.)

Shape suffixes: O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.quant.affine_storage import AffineConfig
from finetune.quant.base import QuantConfig
from finetune.quant.grid import Grid, Regrouped
from finetune.quant.packed import PackedWeight
from finetune.quant.rounders.base import CALIBRATORS, CalibratorConfig, Choice, Rounder

COLUMNS = 128
"""Columns whose corrections are applied one by one; the rest of the matrix gets them in one product (section 3.2)."""
STEPS = (1, 10, 100)
"""Multiples of the damping that are tried until the Cholesky factor exists."""


@dataclass
class GPTQConfig(CalibratorConfig):
    """Settings of GPTQ.

    Attributes:
        act_order: take the columns with the most energy first; without `static_groups` the groups with the most, and
            within a group its columns.
        static_groups: fix the ranges of all groups before the first code is chosen; otherwise that of a group when it
            is reached. It makes no difference where a row is one group, or where groups run over more than one row.
        damping: share of the mean diagonal of H that is added to its diagonal; tenfold, then a hundredfold, where H is
            not positive definite in float32, which is reported.
        mse: search, for each group, the share of its range that leaves the least sum of |error|^2.4; integer formats.
    """

    needs_inputs: ClassVar[bool] = True

    name: str = "gptq"
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    mse: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ConfigError(f"calibrator.damping is {self.damping}: expected a share above 0, at most 1")

    def check_format(self, quant: QuantConfig) -> None:
        if self.mse and not isinstance(quant, AffineConfig):
            raise ConfigError(f"calibrator.mse=true searches the scales of integer formats: quant={quant.name} is none")


@CALIBRATORS.register(GPTQConfig)
class GPTQ(Rounder):
    """Codes column by column. H is the sum of x x^T in float32; its scale changes nothing."""

    def __init__(self, config: GPTQConfig | None = None) -> None:
        self.config = config or GPTQConfig()

    def fit(self, module: PackedWeight, weight: Tensor) -> Grid:
        return module.fit_clipped(weight) if self.config.mse else module.fit(weight)

    def choose(self, grid: Grid, w_OI: Tensor, gram_II: Tensor) -> Choice | None:
        if not bool((gram_II.diagonal() > 0).any()):
            return None
        gram_II = alive(gram_II)
        size = grid.group if not self.config.static_groups and isinstance(grid, Regrouped) else None
        order_I = torch.arange(len(gram_II), device=gram_II.device)
        if self.config.act_order:
            order_I = by_energy(gram_II.diagonal(), size)
        factor_II, damping = inverse_factor(gram_II, self.config.damping, order_I)
        if factor_II is None:
            return Choice(
                grid.round_columns(w_OI, 0), None, f"H is singular up to damping {damping:g}: rounded to nearest"
            )
        note = f"H needed damping {damping:g}" if damping != self.config.damping else ""
        codes_OI, fitted = _codes(grid, w_OI, factor_II, order_I, size)
        return Choice(codes_OI, damping, note, fitted)


def by_energy(energy_I: Tensor, size: int | None) -> Tensor:
    """An order of columns, the most energy first.

    Args:
        size: of groups that stay together, the one with the most first and a short one last; None for no groups.
    """
    if size is None:
        return energy_I.argsort(descending=True, stable=True)
    whole = len(energy_I) // size * size
    energy_GC = energy_I[:whole].view(-1, size)
    within_GC = energy_GC.argsort(dim=1, descending=True, stable=True)
    within_GC += torch.arange(0, whole, size, device=energy_I.device).unsqueeze(1)
    groups_G = energy_GC.sum(dim=1).argsort(descending=True, stable=True)
    return torch.cat([within_GC[groups_G].flatten(), whole + by_energy(energy_I[whole:], None)])


def alive(gram_II: Tensor) -> Tensor:
    """H with a curvature for inputs that were zero in all samples: any that is positive leaves their columns to be
    rounded alone; the mean of the others is neutral to the damping.

    Args:
        gram_II: not all zero.
    """
    diagonal_I = gram_II.diagonal()
    alive_I = diagonal_I > 0
    if bool(alive_I.all()):
        return gram_II
    lively_II = gram_II.clone()
    lively_II.diagonal().add_((~alive_I).to(gram_II.dtype) * diagonal_I[alive_I].mean())
    return lively_II


def inverse_factor(gram_II: Tensor, damping: float, order_I: Tensor | None = None) -> tuple[Tensor | None, float]:
    """The upper Cholesky factor of the inverse, and the damping that it needed; None where it does not exist.

    Takes room for one more matrix: factors and inverse take each other's place, laid out by columns as LAPACK wants.

    Args:
        damping: share of the mean diagonal that is tried first.
        order_I: of rows and columns, where another is wanted.
    """
    order_I = torch.arange(len(gram_II), device=gram_II.device) if order_I is None else order_I
    mean, share = gram_II.diagonal()[order_I].mean(), damping
    for step in STEPS:
        share = damping * step
        matrix_II = gram_II.T[order_I[:, None], order_I].T
        matrix_II.diagonal().add_(share * mean)
        failed = torch.empty((), dtype=torch.int32, device=gram_II.device)
        torch.linalg.cholesky_ex(matrix_II, out=(matrix_II, failed))
        if failed:
            continue
        torch.cholesky_inverse(matrix_II, out=matrix_II)
        torch.linalg.cholesky_ex(matrix_II, upper=True, out=(matrix_II, failed))
        if not failed and bool(matrix_II.sum().isfinite()):  # one that is not makes the sum so
            return matrix_II, share
    return None, share


def _codes(
    grid: Grid, w_OI: Tensor, factor_II: Tensor, order_I: Tensor, size: int | None
) -> tuple[Tensor, Grid | None]:
    """Code after code in the given order of columns, and the grid that they lie on, where groups are fitted on the way.

    Args:
        order_I: with `size`, each group's columns stand behind one another, and a short group last.
        size: columns of a group, a power of two, whose range is fitted when its first column is reached.
    """
    order = order_I.tolist()
    w_IO = w_OI[:, order_I].T.contiguous()  # a column, which is what is read and written here, then lies in one piece
    codes: list[Tensor] = [w_IO] * len(order)
    fitted = grid

    def settle(place: int) -> Tensor:
        nonlocal fitted
        column = order[place]
        if size is not None and isinstance(fitted, Regrouped) and place % size == 0:
            run = order_I[place : place + size]
            fitted = fitted.refit(w_IO[place + run.argsort()].T, min(order[place : place + size]))
        codes[column] = fitted.round_columns(w_IO[place].unsqueeze(1), column)
        return fitted.decode(codes[column], column).squeeze(1)

    sweep(w_IO, factor_II, settle, max(size or 0, COLUMNS))
    return torch.cat(codes, dim=1), fitted if size is not None else None


def sweep(w_IO: Tensor, factor_II: Tensor, settle: Callable[[int], Tensor], columns: int = COLUMNS) -> None:
    """Settle column after column, in place, each one's error spread over the columns still to come (section 3.2).

    Args:
        w_IO: float32, a column of the weight in each row; holds what was settled afterwards.
        factor_II: upper Cholesky factor of the inverse of H.
        settle: told a place, it reads what `w_IO` has there by now, and says what becomes of it, float32 [O].
        columns: how many are corrected one by one; at each multiple of it, all of `w_IO` is up to date.
    """
    inverse_I = factor_II.diagonal().reciprocal()
    for start in range(0, len(w_IO), columns):
        end = min(start + columns, len(w_IO))
        errors = torch.empty_like(w_IO[start:end])
        for place in range(start, end):
            settled_O = settle(place)
            error_O = (w_IO[place] - settled_O) * inverse_I[place]
            w_IO[place] = settled_O
            w_IO[place + 1 : end].addr_(factor_II[place, place + 1 : end], error_O, alpha=-1)
            errors[place - start] = error_O
        w_IO[end:].addmm_(factor_II[start:end, end:].T, errors, alpha=-1)

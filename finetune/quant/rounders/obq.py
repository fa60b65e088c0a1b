"""OBQ (Frantar, Singh, Alistarh 2022, arXiv:2208.11580, sections 4 and 5): one weight of a row after the other.

Of the weights of a row that are still free, the one is rounded whose rounding loses least; all others make its error
good as far as the inverse Hessian of the free weights allows, and the inverse loses its row and column by one step of
Gaussian elimination. A weight that lies beyond the outermost value of its grid goes first, the furthest of them before
the others: nothing makes its error smaller, and later there are fewer weights to make it good. (Section 5 waits until
it is half a step out. Over eight times 200 problems of six weights against their optima that costs 10 %.)

Every row has an order and so an inverse of its own, and takes inputs^3 / 2 multiply-adds. The inverse of row r after k
steps is kept as `inverse_II - factor_RKI[r, :k].T @ factor_RKI[r, :k]`: a Cholesky factor whose pivots are chosen on
the way. That reads a quarter of what updating the inverse in place moves, and the first inverse is shared by all rows.

Over any grid. An input that was zero in all samples teaches nothing about its column, which is rounded to nearest.

Shape suffixes: O out features, I in features, R rows that are handled at a time, K steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.quant.grid import Grid
from finetune.quant.rounders.base import CALIBRATORS, CalibratorConfig, Choice, Rounder
from finetune.quant.rounders.gptq import alive, inverse_factor

FACTOR_BYTES = 1 << 26
"""Of the factors of the rows that are handled at a time, unless a single one is larger."""
RATE = 1e9
"""Multiply-adds a second that one core was seen to do, for estimates."""
FAR = 1e30
"""A weight beyond any grid, whose square is still finite."""


@dataclass
class OBQConfig(CalibratorConfig):
    """Settings of OBQ.

    Attributes:
        damping: share of the mean diagonal of H that is added to its diagonal; tenfold, then a hundredfold, where H is
            not positive definite, which is reported.
        max_inputs: a layer with more inputs is refused before any is quantized: the cost of a row is cubic in them.
    """

    needs_inputs: ClassVar[bool] = True

    name: str = "obq"
    damping: float = 0.01
    max_inputs: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ConfigError(f"calibrator.damping is {self.damping}: expected a share above 0, at most 1")
        if self.max_inputs < 1:
            raise ConfigError(f"calibrator.max_inputs is {self.max_inputs}: expected 1 or more inputs")


@CALIBRATORS.register(OBQConfig)
class OBQ(Rounder):
    """Codes weight by weight, in float64 where the device has it. H is the sum of x x^T; its scale changes nothing."""

    def __init__(self, config: OBQConfig | None = None) -> None:
        self.config = config or OBQConfig()

    def check_layer(self, name: str, out_features: int, in_features: int) -> None:
        most = self.config.max_inputs
        if in_features > most:
            hours = out_features * in_features**3 / 2 / RATE / 3600
            raise ConfigError(
                f"calibrator=obq is cubic in the inputs of a layer: {name} has {in_features} (a core would take about "
                f"{hours:.2g} h), calibrator.max_inputs is {most}: use calibrator=gptq"
            )

    def choose(self, grid: Grid, w_OI: Tensor, gram_II: Tensor) -> Choice | None:
        if not bool((gram_II.diagonal() > 0).any()):
            return None
        exact = torch.float32 if w_OI.device.type == "mps" else torch.float64
        factor_II, damping = inverse_factor(alive(gram_II.to(exact)), self.config.damping)
        if factor_II is None:
            note = f"H is singular up to damping {damping:g}: rounded to nearest"
            return Choice(grid.round_columns(w_OI, 0), None, note)
        note = f"H needed damping {damping:g}" if damping != self.config.damping else ""
        codes_OI, _ = eliminate(grid, w_OI.to(exact), factor_II.T @ factor_II)
        return Choice(codes_OI, damping, note)


def eliminate(grid: Grid, w_OI: Tensor, inverse_II: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a matrix, and the loss of each row as the sum of what the steps predict, [O].

    For d = w - decode(codes) that is d H d^T, with H the inverse of `inverse_II`. All is computed in the dtype of
    `w_OI`, but for the grid, whose values are float32.
    """
    size = max(1, FACTOR_BYTES // (w_OI.element_size() * w_OI.shape[1] ** 2))
    parts = [
        _rows(grid.part(slice(start, start + size)), w_RI, inverse_II)
        for start, w_RI in zip(range(0, len(w_OI), size), w_OI.split(size), strict=True)
    ]
    return torch.cat([codes for codes, _ in parts]), torch.cat([loss for _, loss in parts])


def _rows(grid: Grid, w_RI: Tensor, inverse_II: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows at a time, each in its own order."""
    rows, width = w_RI.shape
    row_R, w_RI = torch.arange(rows, device=w_RI.device), w_RI.clone()
    least_RI, most_RI = (grid.decode(grid.round_columns(torch.full_like(w_RI, end), 0)) for end in (-FAR, FAR))
    left_RI = inverse_II.diagonal().repeat(rows, 1)  # the diagonals of the inverses of what is free
    free_RI = torch.ones_like(w_RI, dtype=torch.bool)
    factor_RKI = w_RI.new_zeros(rows, width, width)
    codes_RI, loss_R = grid.round_columns(w_RI, 0), w_RI.new_zeros(rows)
    for step in range(width):
        nearest_RI = grid.round_columns(w_RI, 0)
        error_RI = w_RI - grid.decode(nearest_RI)
        beyond_RI = torch.where(free_RI & ((w_RI > most_RI) | (w_RI < least_RI)), error_RI.abs(), 0)
        score_RI = error_RI.square().div_(left_RI).masked_fill_(~free_RI, torch.inf)
        furthest_R, place_R = beyond_RI.max(dim=1)
        place_R = torch.where(furthest_R > 0, place_R, score_RI.argmin(dim=1))
        loss_R += score_RI[row_R, place_R]
        codes_RI[row_R, place_R] = nearest_RI[row_R, place_R]
        free_RI[row_R, place_R] = False
        known_RK = factor_RKI[row_R, :step, place_R]
        column_RI = inverse_II[place_R] - torch.bmm(known_RK.unsqueeze(1), factor_RKI[:, :step]).squeeze(1)
        pivot_R1 = left_RI[row_R, place_R].sqrt().unsqueeze(1)
        update_RI = column_RI.div_(pivot_R1).mul_(free_RI)
        w_RI.addcmul_(error_RI[row_R, place_R].unsqueeze(1) / pivot_R1, update_RI, value=-1)
        left_RI = left_RI.addcmul_(update_RI, update_RI, value=-1).clamp_(min=torch.finfo(w_RI.dtype).tiny)
        factor_RKI[:, step] = update_RI
    return codes_RI, loss_R

"""What every rounder offers, and how one is applied to a frozen module.

A rounder chooses the codes of one matrix on any grid (quant/grid.py), given what its inputs look like. `apply` does
the rest, the same for all: stacks of experts one matrix at a time, what is done where a matrix saw no inputs, errors
before and after, and the promise that nothing becomes worse than rounding to nearest.

Shape suffixes: E experts, O out features, I in features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from finetune.quant.base import QuantConfig
from finetune.quant.grid import Grid, Regrouped
from finetune.quant.packed import PackedWeight
from finetune.registry import Registry


@dataclass
class CalibratorConfig:
    """How codes are chosen. Sub-classes are registered in `CALIBRATORS`, one a rounder.

    Attributes:
        needs_inputs: whether it cannot work without calibration data.
    """

    needs_inputs: ClassVar[bool] = False

    name: str = "base"

    def check_format(self, quant: QuantConfig) -> None:
        """Refuse a storage format that this rounder cannot round onto.

        Raises:
            ConfigError: naming both.
        """


CALIBRATORS: Registry[CalibratorConfig] = Registry("calibrator", "finetune.quant.rounders")
"""`CALIBRATORS.build(config)` returns a `Rounder`."""


@dataclass(frozen=True)
class Choice:
    """The codes of one matrix.

    Attributes:
        codes_OI: on the grid.
        damping: the share of the mean diagonal of H that was needed; None where there was no use for any.
        note: what the user should know, empty for nothing.
        grid: that they lie on, where it is another than the one that was given.
    """

    codes_OI: Tensor
    damping: float | None = None
    note: str = ""
    grid: Grid | None = None


@dataclass(frozen=True)
class Rounded:
    """What a rounder did to one weight.

    Attributes:
        error_rtn, error: relative squared error of the output on the given inputs, tr((W - Q) H (W - Q)^T) /
            tr(W H W^T), of rounding to nearest, and of what is stored now; without inputs that of the weight (H = I).
        damping: the largest that a matrix needed; None where rounding to nearest was kept.
        note: what the user should know, empty for nothing.
        grid: that its codes lie on; None where no inputs were seen.
    """

    error_rtn: float
    error: float
    damping: float | None = None
    note: str = ""
    grid: Grid | None = None


class Rounder(ABC):
    """Chooses codes for one matrix after the other."""

    @abstractmethod
    def choose(self, grid: Grid, w_OI: Tensor, gram_II: Tensor) -> Choice | None:
        """Codes of a matrix on its grid; None where rounding to nearest is all there is to do.

        Args:
            w_OI: float32; left as it is.
            gram_II: sum of x x^T over the inputs, float32, on the same device, not all zero.
        """

    def check_layer(self, name: str, out_features: int, in_features: int) -> None:
        """Refuse a layer that would take this rounder too long; asked of each before the first is quantized.

        Raises:
            ConfigError: naming the layer and what to use.
        """
        return None

    def fit(self, module: PackedWeight, weight: Tensor) -> Grid:
        """The grid to choose codes on; by default the one that the format would choose.

        Args:
            weight: in the layout of the codes, on the module's device.
        """
        return module.fit(weight)


@torch.no_grad()
def apply(rounder: Rounder, module: PackedWeight, weight: Tensor, grams: Sequence[Tensor | None]) -> Rounded:
    """Store a weight in a frozen module, its codes chosen by a rounder where that errs less than the nearest codes.

    Args:
        module: empty or filled; its device is where all of this happens.
        weight: as `module.store` takes it.
        grams: sum of x x^T, [I, I], over the inputs of each expert, or of the one matrix; None for one that saw none.
            Such a matrix is rounded to nearest.

    Raises:
        ModelError: when a weight is not finite.
    """
    module.store(weight)
    device = next(module.parameters()).device
    laid = module.codes_layout(weight.to(device))
    tally = _Tally()
    if not any(gram is not None and bool((gram.diagonal() > 0).any()) for gram in grams):
        tally.add(laid.float(), module.decode(torch.float32), None)
        note = "saw no inputs: rounded to nearest" if any(gram is None for gram in grams) else "its inputs are all zero"
        return tally.result(note if grams else "")
    grid = given = rounder.fit(module, laid)
    nearest = module.decode(torch.float32)
    codes, chosen = [], False
    for number, (w_OI, near_OI, part) in enumerate(_matrices(laid, nearest, given)):
        gram_II = grams[number]
        gram_II = None if gram_II is None else gram_II.to(device=device, dtype=torch.float32)
        choice = None if gram_II is None else rounder.choose(part, w_OI, gram_II)
        better = tally.judge(w_OI, near_OI, part, gram_II, choice)
        codes.append(choice.codes_OI if choice is not None and better else part.round_columns(w_OI, 0))
        chosen |= better
        if better and choice is not None and isinstance(choice.grid, Regrouped):
            grid = choice.grid if laid.dim() == 2 else cast(Regrouped, grid).with_expert(number, choice.grid)
    if chosen:
        module.take(grid, torch.stack(codes) if laid.dim() == 3 else codes[0])
    return tally.result("", grid)


def _matrices(weight: Tensor, nearest: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor, Grid]]:
    """The matrices of a weight, what rounding to nearest makes of them, and the grid of each."""
    if weight.dim() == 2:
        yield weight.float(), nearest, grid
        return
    for number in range(weight.shape[0]):
        yield weight[number].float(), nearest[number], grid.expert(number)


class _Tally:
    """Errors added up over the matrices of a weight."""

    def __init__(self) -> None:
        self.energy = self.before = self.after = 0.0
        self.damping: float | None = None
        self.notes: dict[str, int] = {}

    def add(self, w_OI: Tensor, decoded_OI: Tensor, gram_II: Tensor | None) -> None:
        """A matrix that stays rounded to nearest."""
        error = squared(w_OI - decoded_OI, gram_II)
        self.energy, self.before = self.energy + squared(w_OI, gram_II), self.before + error
        self.after += error

    def judge(self, w_OI: Tensor, near_OI: Tensor, grid: Grid, gram_II: Tensor | None, choice: Choice | None) -> bool:
        """Whether a choice errs less than rounding to nearest."""
        if gram_II is None:
            self._note("saw no inputs: rounded to nearest")
            return False
        self.energy += squared(w_OI, gram_II)
        before = squared(w_OI - near_OI, gram_II)
        self.before += before
        if choice is not None and choice.note:
            self._note(choice.note)
        after = before if choice is None else squared(w_OI - (choice.grid or grid).decode(choice.codes_OI), gram_II)
        better = after < before
        self.after += min(after, before)
        if better and choice is not None and choice.damping is not None:
            self.damping = max(choice.damping, self.damping or 0.0)
        return better

    def _note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1

    def result(self, note: str, grid: Grid | None = None) -> Rounded:
        """What to report."""
        share = 1 / self.energy if self.energy > 0 else 0.0
        notes = [note] if note else [f"{n} of its experts: {text}" if n > 1 else text for text, n in self.notes.items()]
        return Rounded(self.before * share, self.after * share, self.damping, "; ".join(notes), grid)


def squared(delta_OI: Tensor, gram_II: Tensor | None) -> float:
    """tr(D H D^T), H = I where it is None."""
    product = delta_OI if gram_II is None else delta_OI @ gram_II
    return float((product * delta_OI).sum(dtype=torch.float64))

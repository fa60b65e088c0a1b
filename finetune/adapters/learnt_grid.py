"""The grid of an integer weight that trains: what qat.py and qat_scales.py have in common.

Shape suffixes: B leading dimensions, O out features, I in features, G groups of a row; `...` a stack of experts or
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from finetune.adapters.adapted import AdaptedWeight
from finetune.kernels.computed_linear import computed_linear
from finetune.quant.affine_storage import Affine
from finetune.quant.packed_expert import PackedExpert

SCALE_DTYPE = torch.bfloat16
"""Scales are numbers of it, in training and wherever they are stored: float32, and float16 where they are normal there,
hold them too, so no checkpoint rounds them."""
LEAST_STEP = 2.0**-6
"""A learnt scale stays above this share of where it started."""


def to_scale_dtype(scale: Tensor) -> Tensor:
    """Scales rounded to what is stored, in float32; the gradient passes straight through."""
    # Exact: the difference of numbers this near to each other is a float32, and so is the sum.
    return scale + (scale.to(SCALE_DTYPE).float() - scale).detach()


class LearntGrid(AdaptedWeight):
    """A frozen weight whose grid trains.

    Attributes:
        step: how far each scale has moved from where it started, as a share of it [.., O, G]; None where none trains.
        offset: how far each real zero point has, in scales of the start [.., O, G]; None where there is none.
    """

    over: ClassVar[bool] = False  # the grid is that of the stored weight

    step: nn.Parameter | None
    offset: nn.Parameter | None

    def begin_grid(self, learned: bool) -> None:
        """Begin where the grid starts."""
        self.step = self.offset = None
        if learned:
            scale_OG, zero_OG = self.start()
            self.step = nn.Parameter(torch.zeros(scale_OG.shape))
            if zero_OG is not None and zero_OG.is_floating_point():
                self.offset = nn.Parameter(torch.zeros(scale_OG.shape))

    def start(self) -> tuple[Tensor, Tensor | None]:
        """Scales, float32, and zero points that training starts from: those of the base."""
        base = cast(Affine, self.base)
        return to_scale_dtype(base.scale.float()), base.zero

    def learnt(self, expert: Any = ...) -> list[Tensor]:
        """What trains of the grid."""
        return [tensor[expert] for tensor in (self.step, self.offset) if tensor is not None]

    def moved(self, learnt: Sequence[Tensor], expert: Any = ...) -> tuple[Tensor, Tensor | None]:
        """Scales, float32, and zero points as they are now, with a gradient to what trains of them."""
        scale_OG, zero_OG = self.start()
        scale_OG, zero_OG = scale_OG[expert], None if zero_OG is None else zero_OG[expert]
        if len(learnt) > 1 and zero_OG is not None:
            zero_OG = zero_OG + scale_OG * learnt[1].float()
        if learnt:
            scale_OG = to_scale_dtype(scale_OG * (1 + learnt[0].float()).clamp(min=LEAST_STEP))
        return scale_OG, zero_OG


class ComputedWeight(PackedExpert):
    """The weight of one expert, computed where it is used; see its base.

    Args:
        weight: makes w_OI, in float32.
        trained: of these.
        dtype: of the weights that it stands for.
        transposed: whether memory has them as [I, O].
    """

    def __init__(
        self, weight: Callable[..., Tensor], trained: Sequence[Tensor], dtype: torch.dtype, transposed: bool
    ) -> None:
        self._weight, self._trained, self._dtype, self._transposed = weight, trained, dtype, transposed
        self._decode = self._computed

    def product(self, x_BI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """`x_BI @ w_OI.T + bias_O`."""
        return computed_linear(x_BI, bias_O, self._weight, *self._trained)

    def _computed(self) -> Tensor:
        return self._weight(*self._trained).to(self._dtype)

"""Affine codes whose groups are not runs of neighbouring inputs: GPTQ's act-order without static groups.

Frantar et al. 2022 (arXiv:2210.17323) quantize columns with the most energy first; where groups are fitted on the way,
a group is whatever columns came one after another. Such columns are stored in that order, so that groups are runs
again, and the order beside them; inputs are put into it before they are multiplied. It costs 32 bits an input.

Only checkpoints of others have it (model/gptq_format.py): our own rounders fix the groups first.

Shape suffixes: O out features, I in features, B leading dimensions of the input, G groups of a row.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError, ModelError
from finetune.kernels.operand import Operand
from finetune.kernels.ordered import ordered, reordered, restored
from finetune.quant.affine import AffineLinear
from finetune.quant.base import QuantConfig
from finetune.quant.packed import PackedWeight

ORDER = "weight.order"
"""Its key on disk, beside those of quant/affine_storage.py."""


class OrderedAffineLinear(AffineLinear):
    """A linear layer whose weight is stored in affine codes, its columns in an order of their own.

    Attributes:
        order: int32 [I], the input that each stored column belongs to.
    """

    order: nn.Parameter

    def __init__(self, config: Any, out_features: int, in_features: int, **options: Any) -> None:
        super().__init__(config, out_features, in_features, **options)
        self.set_order(torch.arange(in_features, dtype=torch.int32, device=self.weight.device))

    def set_order(self, order_I: Tensor) -> None:
        """Take over an order; what is stored stays as it is."""
        self.order = nn.Parameter(order_I.detach(), requires_grad=False)

    def forward(self, x_BI: Tensor) -> Tensor:
        return super().forward(reordered(x_BI, self.order))

    def operand(self) -> Operand:
        return ordered(super().operand(), self.order)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return restored(self.decode(dtype), self.order)

    def codes_layout(self, weight: Tensor) -> Tensor:
        return reordered(super().codes_layout(weight), self.order.to(weight.device))

    def like(self, settings: QuantConfig) -> Self:
        empty = super().like(settings)
        empty.set_order(self.order)
        return empty

    def shifted(self, shift_OG: Tensor) -> Self:
        """Refused: neighbouring inputs share no group.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("the groups of an act-order checkpoint are no runs of inputs: a shift a group cannot be kept")

    def bits_per_weight(self) -> float:
        return super().bits_per_weight() + 8 * self.order.element_size() / self.out_features

    def packed_state(self) -> dict[str, Tensor]:
        return super().packed_state() | {ORDER: self.order.detach()}

    def take_state(self, state: dict[str, Tensor], name: str = "") -> None:
        super().take_state(state, name)
        if ORDER not in state:
            raise ModelError(f"{name}{ORDER} is missing from the checkpoint")
        order_I = state[ORDER].to(self.weight.device)
        every_I = torch.arange(self.in_features, device=order_I.device, dtype=order_I.dtype)
        if order_I.dtype != torch.int32 or not torch.equal(order_I.sort().values, every_I):
            raise ModelError(f"{name}{ORDER} is no order of {self.in_features} inputs in int32")
        self.set_order(order_I)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act_order"


def in_order(empty: PackedWeight, state: dict[str, Tensor]) -> PackedWeight:
    """The empty module that can take a state: one with an order where that has one.

    Raises:
        ModelError: for an order that nothing here can keep.
    """
    if ORDER not in state:
        return empty
    if not isinstance(empty, AffineLinear):
        raise ModelError(f"{ORDER} belongs to a linear layer in affine codes, not to {type(empty).__name__}")
    linear = OrderedAffineLinear(
        empty.settings(),
        empty.out_features,
        empty.in_features,
        dtype=empty.dtype,
        device=empty.weight.device,
        transposed=empty.transposed,
    )
    linear.bias = empty.bias
    return linear

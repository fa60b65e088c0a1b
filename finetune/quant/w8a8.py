"""Frozen modules with weights and inputs in integers: a linear layer, and a stack of experts (weight-only).

Shape suffixes: B leading dimensions of the input, O out features, I in features.

Arithmetic in kernels/w8a8.py, settings and storage in quant/w8a8_storage.py. Smoothing (quant/transforms) makes inputs
that round well; without it outliers take the range from all the rest, and nothing is kept aside as in quant/int8.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.kernels import w8a8
from finetune.kernels.operand import Operand
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.packed import PackedExperts, PackedLinear, builder
from finetune.quant.w8a8_grid import survivable
from finetune.quant.w8a8_storage import LEAST_MAGNITUDE, Integer, IntegerConfig


@dataclass
class W8A8Config(IntegerConfig):
    """8 bits: settings as in `IntegerConfig`."""

    name: str = "w8a8"


@dataclass
class W6A6Config(IntegerConfig):
    """6 bits, each code in a byte: settings as in `IntegerConfig`."""

    name: str = "w6a6"


@dataclass
class W4A8Config(IntegerConfig):
    """4 bits of weights, each code in a byte, 8 of inputs: settings as in `IntegerConfig`."""

    name: str = "w4a8"
    group_size: int = 64


class IntegerLinear(PackedLinear, Integer):
    """A linear layer in integers that rounds its inputs to integers as well."""

    def forward(self, x_BI: Tensor) -> Tensor:
        self._check_scale()
        if self.inputs == "none":
            return w8a8.linear_w8a8(x_BI, self.bias, self.weight, self.weight_scale)
        static = self.input_scale if self.inputs == "static" else None
        return w8a8.integer_linear(
            x_BI, self.bias, self.weight, self.weight_scale, static, self.input_bits, self.inputs == "token"
        )

    def operand(self) -> Operand:
        self._check_scale()
        return self.as_operand(self.weight, self.weight_scale, self.inputs)

    def see_inputs(self, largest: Tensor | None) -> None:
        if self.inputs != "static":
            return
        if largest is None:
            raise ModelError(
                f"a layer of {self.in_features} inputs saw none in calibration, so it has no static scale: expected"
                " quant.static=false, or text that reaches it"
            )
        scale = largest.float().clamp(min=LEAST_MAGNITUDE).view(1) / w8a8.levels(self.input_bits)
        self.input_scale = nn.Parameter(survivable(scale, self.dtype), requires_grad=False)

    def like(self, settings: QuantConfig) -> Self:
        empty = super().like(settings)
        if empty.inputs == "static":
            empty.input_scale = self.input_scale
        return empty

    def _check_scale(self) -> None:
        if self.inputs == "static" and self.input_scale is None:
            raise ModelError("quant.static=true and no scale for inputs: quantize with data.calibration first")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={'tensor' if self.by_tensor else 'channel'}, inputs={self.inputs}"


class IntegerExperts(PackedExperts, Integer):
    """A stack of experts in integers. Inputs are never rounded, whatever the settings: few tokens meet an expert, so
    that a scale for all of its inputs would depend on where the router sent them."""

    def expert_operand(self, expert: int) -> Operand:
        return self.as_operand(self.weight[expert], self.weight_scale[expert], "none")

    def decode_expert(self, expert: int) -> Tensor:
        shape = list(self.shape[1:])
        return w8a8.dequantize_w8a8(self.weight[expert], self.weight_scale[expert], shape, self.dtype)

    def _holds_input_scale(self) -> bool:
        return False


for _config in (W8A8Config, W6A6Config, W4A8Config):
    QUANTIZERS.register(_config)(builder(IntegerLinear, IntegerExperts))

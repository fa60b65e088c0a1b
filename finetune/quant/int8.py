"""Frozen modules in row-wise int8: a linear layer (LLM.int8() or weight-only), and a stack of experts (weight-only).

Shape suffixes: O out features, I in features, B leading dimensions of the input.

LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339); arithmetic in kernels/int8.py, storage in quant/int8_storage.py.
"""

from __future__ import annotations

from torch import Tensor

from finetune.kernels import int8
from finetune.kernels.columns import columns_part, with_columns
from finetune.kernels.operand import Operand
from finetune.quant.base import QUANTIZERS
from finetune.quant.int8_storage import Int8, Int8Config
from finetune.quant.packed import PackedExperts, PackedLinear, builder


class Int8Linear(PackedLinear, Int8):
    """A linear layer in int8; with a threshold its inputs are rounded to int8 too, all but outlier columns."""

    def forward(self, x_BI: Tensor) -> Tensor:
        y_BO = int8.linear_int8(x_BI, self.bias, self.weight, self.SCB, self.threshold)
        if self.columns is None or self.remainder is None:
            return y_BO
        return y_BO + columns_part(x_BI, self.columns, self.remainder)

    def operand(self) -> Operand:
        stored = self.as_operand(self.weight, self.SCB, self.threshold)
        if self.columns is None or self.remainder is None:
            return stored
        return with_columns(stored, self.columns, self.remainder)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:g}"


class Int8Experts(PackedExperts, Int8):
    """A stack of experts in int8. Inputs are never rounded, whatever the threshold: few tokens meet an expert, and
    which columns hold an outlier would depend on where the router sent them."""

    def expert_operand(self, expert: int) -> Operand:
        return self.as_operand(self.weight[expert], self.SCB[expert], 0.0)

    def decode_expert(self, expert: int) -> Tensor:
        return int8.dequantize_int8(self.weight[expert], self.SCB[expert], list(self.shape[1:]), self.dtype)


QUANTIZERS.register(Int8Config)(builder(Int8Linear, Int8Experts))

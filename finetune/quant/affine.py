"""Frozen modules in affine integer codes: a linear layer, and a stack of experts; int8g, int4, int3 and int2.

Shape suffixes: O out features, I in features, B leading dimensions of the input.

Round-to-nearest onto a uniform grid for each group of inputs (quant/affine_grid.py); storage in
quant/affine_storage.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from finetune.kernels import affine
from finetune.kernels.operand import Operand
from finetune.quant.affine_storage import Affine, AffineConfig, Stored
from finetune.quant.base import QUANTIZERS
from finetune.quant.packed import PackedExperts, PackedLinear, builder


@dataclass
class Int8gConfig(AffineConfig):
    """8 bits: settings as in `AffineConfig`."""

    name: str = "int8g"
    symmetric: bool = True


@dataclass
class Int4Config(AffineConfig):
    """4 bits: settings as in `AffineConfig`."""

    name: str = "int4"


@dataclass
class Int3Config(AffineConfig):
    """3 bits: settings as in `AffineConfig`."""

    name: str = "int3"


@dataclass
class Int2Config(AffineConfig):
    """2 bits: settings as in `AffineConfig`."""

    name: str = "int2"


class AffineLinear(PackedLinear, Affine):
    """A linear layer whose weight is stored in affine codes."""

    def forward(self, x_BI: Tensor) -> Tensor:
        return affine.linear_affine(x_BI, self.bias, *self.packed(), self.bits, self.group_size, self.out_features)

    def operand(self) -> Operand:
        return self.as_operand(self.packed())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}, zero_point={self.zeros}"


class AffineExperts(PackedExperts, Affine):
    """A stack of expert projections; an expert begins on a byte, so that each can be read alone."""

    def expert_operand(self, expert: int) -> Operand:
        return self.as_operand(self._one(expert))

    def decode_expert(self, expert: int) -> Tensor:
        shape = list(self.shape[1:])
        return affine.dequantize_affine(*self._one(expert), self.bits, self.group_size, shape, self.dtype)

    def _one(self, expert: int) -> Stored:
        return Stored(self.weight[expert], self.scale[expert], None if self.zero is None else self.zero[expert])


for _config in (Int8gConfig, Int4Config, Int3Config, Int2Config):
    QUANTIZERS.register(_config)(builder(AffineLinear, AffineExperts))

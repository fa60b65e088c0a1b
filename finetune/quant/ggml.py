"""Frozen modules in llama.cpp's blocks of 32 weights: a linear layer, and a stack of experts; Q4_0 to Q8_0.

Shape suffixes: O out features, I in features, B leading dimensions of the input.

A row is held in the very bytes of a GGUF file (kernels/ggml.py), rounded by ggml's own rules (quant/ggml_grid.py);
storage in quant/ggml_storage.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from finetune.kernels import ggml
from finetune.kernels.operand import Operand
from finetune.quant.base import QUANTIZERS
from finetune.quant.ggml_storage import Ggml, GgmlConfig, Stored
from finetune.quant.packed import PackedExperts, PackedLinear, builder


@dataclass
class Q4_0Config(GgmlConfig):
    """4 bits and a scale: settings as in `GgmlConfig`."""

    name: str = "q4_0"


@dataclass
class Q4_1Config(GgmlConfig):
    """4 bits, a scale and the least value: settings as in `GgmlConfig`."""

    name: str = "q4_1"


@dataclass
class Q5_0Config(GgmlConfig):
    """5 bits and a scale: settings as in `GgmlConfig`."""

    name: str = "q5_0"


@dataclass
class Q5_1Config(GgmlConfig):
    """5 bits, a scale and the least value: settings as in `GgmlConfig`."""

    name: str = "q5_1"


@dataclass
class Q8_0Config(GgmlConfig):
    """8 bits and a scale: settings as in `GgmlConfig`."""

    name: str = "q8_0"


class GgmlLinear(PackedLinear, Ggml):
    """A linear layer whose weight is stored in blocks."""

    def forward(self, x_BI: Tensor) -> Tensor:
        return ggml.linear_ggml(x_BI, self.bias, *self.packed(), self.storage, self.out_features)

    def operand(self) -> Operand:
        return self.as_operand(self.packed())


class GgmlExperts(PackedExperts, Ggml):
    """A stack of expert projections; an expert begins with a block, so that each can be read alone."""

    def expert_operand(self, expert: int) -> Operand:
        return self.as_operand(self._one(expert))

    def decode_expert(self, expert: int) -> Tensor:
        return ggml.dequantize_ggml(*self._one(expert), self.storage, list(self.shape[1:]), self.dtype)

    def _one(self, expert: int) -> Stored:
        places, values = (None if tensor is None else tensor[expert] for tensor in (self.places, self.values))
        return Stored(self.weight[expert], places, values)


for _config in (Q4_0Config, Q4_1Config, Q5_0Config, Q5_1Config, Q8_0Config):
    QUANTIZERS.register(_config)(builder(GgmlLinear, GgmlExperts))

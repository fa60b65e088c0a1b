"""Frozen modules in a 4-bit codebook (NF4, FP4): a linear layer, and a stack of experts.

Shape suffixes: O out features, I in features, E experts, G blocks, P packed bytes, B leading dimensions of the input.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314), sections 2 and 3; storage in quant/codebook4_storage.py.
"""

from __future__ import annotations

from torch import Tensor

from finetune.kernels import ops, reference
from finetune.kernels.operand import Operand
from finetune.quant.codebook4_storage import Codebook4
from finetune.quant.packed import PackedExperts, PackedLinear, builder


class Codebook4Linear(PackedLinear, Codebook4):
    """A linear layer whose weight is stored in 4-bit codes."""

    def forward(self, x_BI: Tensor) -> Tensor:
        return ops.linear_4bit(x_BI, self.bias, *self.packed(), self.codebook, self.block_size, self.out_features)

    def operand(self) -> Operand:
        return _operand(self.packed(), self)

    def extra_repr(self) -> str:
        double = ", double_quant" if self.double_quant else ""
        return f"{super().extra_repr()}, block_size={self.block_size}{double}"


class Codebook4Experts(PackedExperts, Codebook4):
    """A stack of expert projections whose codes run over the flattened [E, O, I]."""

    def expert_operand(self, expert: int) -> Operand | None:
        """None where an expert does not begin and end with a block."""
        size = self.out_features * self.in_features
        if size % self.block_size:
            return None
        return _operand(self._blocks(expert * size, (expert + 1) * size), self)

    def decode_expert(self, expert: int) -> Tensor:
        """Decode only the blocks it touches, at most one more at either end."""
        size = self.out_features * self.in_features
        first, last = expert * size, (expert + 1) * size
        start = first // self.block_size * self.block_size
        stop = min(-(-last // self.block_size) * self.block_size, self.num_experts * size)
        packed = self._blocks(start, stop)
        flat = ops.dequantize_4bit(*packed, self.codebook, self.block_size, [stop - start], self.dtype)
        return flat[first - start : last - start].view(self.out_features, self.in_features)

    def _blocks(self, start: int, stop: int) -> reference.Packed4bit:
        """The weights from `start`, where a block begins, to `stop`; double quantization undone."""
        low, high = start // self.block_size, -(-stop // self.block_size)
        return reference.Packed4bit(self.weight[start // 2 : (stop + 1) // 2], self._absmax(low, high))

    def _absmax(self, low: int, high: int) -> Tensor:
        """Float32 absmax of the blocks from `low` to `high`."""
        if self.nested_absmax is None:
            return self.absmax[low:high]
        group = low // reference.NESTED_BLOCK
        start = group * reference.NESTED_BLOCK
        nested = self.nested_absmax[group : -(-high // reference.NESTED_BLOCK)]
        return reference.decode_absmax(self.absmax[start:high], nested, self.nested_offset)[low - start :]


def _operand(packed: reference.Packed4bit, module: Codebook4) -> Operand:
    """Packed tensors as operators take them; absent ones left out."""
    tensors = [tensor for tensor in packed if tensor is not None]
    spec = f"codebook4:{module.codebook}:{module.block_size}"
    return Operand(tensors, spec, module.out_features, module.in_features)


build_codebook4 = builder(Codebook4Linear, Codebook4Experts)

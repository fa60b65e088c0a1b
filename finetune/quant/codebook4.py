"""Frozen modules in a 4-bit codebook (NF4, FP4): a linear layer, and a stack of experts.

Shape suffixes: O out features, I in features, E experts, G blocks, P packed bytes, B leading dimensions of the input.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314), sections 2 and 3; storage in quant/codebook4_storage.py.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.kernels import ops, reference
from finetune.kernels.operand import Operand
from finetune.quant.base import FrozenExperts, FrozenLinear
from finetune.quant.codebook4_storage import Codebook4, Codebook4Config
from finetune.quant.packed_expert import PackedExpert


class Codebook4Linear(Codebook4, FrozenLinear):
    """A linear layer whose weight is stored in 4-bit codes.

    Args:
        transposed: this stands for a Conv1D, whose parameter is [I, O]; the codes run over [O, I] nevertheless, as
            bitsandbytes has it.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        config: Codebook4Config,
        out_features: int,
        in_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(config, (out_features, in_features), dtype, device)
        self.transposed = transposed
        value = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if value is None else nn.Parameter(value, requires_grad=False))

    def forward(self, x_BI: Tensor) -> Tensor:
        return ops.linear_4bit(x_BI, self.bias, *self.packed(), self.codebook, self.block_size, self.out_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self._decode(dtype)

    def operand(self) -> Operand:
        tensors = [tensor for tensor in self.packed() if tensor is not None]
        return Operand(tensors, f"codebook4:{self.codebook}:{self.block_size}", self.out_features, self.in_features)

    def requantize(self, w_OI: Tensor) -> Codebook4Linear:
        empty = Codebook4Linear(
            self.settings(),
            self.out_features,
            self.in_features,
            bias=self.bias is not None,
            dtype=self.dtype,
            device=self.weight.device,
            transposed=self.transposed,
        )
        if self.bias is not None:
            empty.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return self._requantized(w_OI, empty)

    def extra_repr(self) -> str:
        double = ", double_quant" if self.double_quant else ""
        return f"{self.in_features}, {self.out_features}, {self.codebook}, block_size={self.block_size}{double}"


class Codebook4Experts(Codebook4, FrozenExperts):
    """A stack of expert projections whose codes run over the flattened [E, O, I].

    Args:
        transposed: the parameter this stands for is [E, I, O]; `store`, `experts[e]`, `dequantize` and `requantize`
            speak that layout.
    """

    def __init__(
        self,
        config: Codebook4Config,
        out_features: int,
        in_features: int,
        *,
        experts: int,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(config, (experts, out_features, in_features), dtype, device)
        self.num_experts = experts
        self.transposed = transposed

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """Decode one expert: only the blocks it touches, at most one more at either end.

        While a graph is recorded it is a `PackedExpert`, decoded where it is used, so that no dense copy is kept.
        """
        index = int(expert)
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert {index} of {self.num_experts}")
        size = self.out_features * self.in_features
        first, last = index * size, (index + 1) * size
        low = first // self.block_size
        high = -(-last // self.block_size)
        start, stop = low * self.block_size, min(high * self.block_size, self.num_experts * size)
        packed = reference.Packed4bit(self.weight[start // 2 : (stop + 1) // 2], self._absmax(low, high))
        if stop - start == size:
            shape, transposed, dtype = self.shape[1:], self.transposed, self.dtype
            one = PackedExpert(packed, self.codebook, self.block_size, shape=shape, transposed=transposed, dtype=dtype)
            return cast(Tensor, one) if torch.is_grad_enabled() else one.dense()
        flat = ops.dequantize_4bit(*packed, self.codebook, self.block_size, [stop - start], self.dtype)
        w_OI = flat[first - start : last - start].view(self.out_features, self.in_features)
        return w_OI.T if self.transposed else w_OI

    def _absmax(self, low: int, high: int) -> Tensor:
        """Float32 absmax of the blocks from `low` to `high`."""
        if self.nested_absmax is None:
            return self.absmax[low:high]
        group = low // reference.NESTED_BLOCK
        start = group * reference.NESTED_BLOCK
        nested = self.nested_absmax[group : -(-high // reference.NESTED_BLOCK)]
        return reference.decode_absmax(self.absmax[start:high], nested, self.nested_offset)[low - start :]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        w_EOI = self._decode(dtype)
        return w_EOI.transpose(1, 2).contiguous() if self.transposed else w_EOI

    def requantize(self, w_EOI: Tensor) -> Codebook4Experts:
        empty = Codebook4Experts(
            self.settings(),
            self.out_features,
            self.in_features,
            experts=self.num_experts,
            dtype=self.dtype,
            device=self.weight.device,
            transposed=self.transposed,
        )
        return self._requantized(w_EOI, empty)

    def _codes_layout(self, weight: Tensor) -> Tensor:
        return super()._codes_layout(weight.transpose(-1, -2) if self.transposed else weight)

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features}, {self.out_features}), {self.codebook}"


def build_codebook4(
    config: Codebook4Config,
    out_features: int,
    in_features: int,
    *,
    bias: bool = False,
    experts: int = 0,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    transposed: bool = False,
) -> Codebook4:
    """An empty linear, or with `experts` an empty stack, in the codebook that the config is named after."""
    if experts:
        return Codebook4Experts(
            config, out_features, in_features, experts=experts, dtype=dtype, device=device, transposed=transposed
        )
    return Codebook4Linear(
        config, out_features, in_features, bias=bias, dtype=dtype, device=device, transposed=transposed
    )

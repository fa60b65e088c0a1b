"""One expert of a 4-bit stack as an operand, while a graph is being recorded.

Shape suffixes: B tokens of an expert, O out features, I in features.

The eager expert loop of transformers multiplies by `experts[e]` with `F.linear` or `@`. Given a dense tensor, autograd
would keep it until the backward: in the end every expert of a layer in 16 bits. This operand hands those two calls to
`linear_4bit`, which keeps the packed tensors and decodes again. It is no tensor; torch passes it such calls by
`__torch_function__` (torch's notes, "Extending torch native API with a Tensor-like type").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.kernels import ops
from finetune.kernels.reference import Packed4bit

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class PackedExpert:
    """A weight w_OI (w_IO where `transposed`) that is decoded only where it is used.

    Args:
        packed: the codes and scales of this expert alone.
        dtype: of the dense tensor that this becomes for any other call.
    """

    def __init__(
        self,
        packed: Packed4bit,
        codebook: str,
        block_size: int,
        *,
        shape: tuple[int, ...],
        transposed: bool,
        dtype: torch.dtype,
    ) -> None:
        self._packed, self._codebook, self._block_size = packed, codebook, block_size
        self._size, self._transposed, self._dtype = shape, transposed, dtype

    def dense(self) -> Tensor:
        """The decoded weight in the layout of the parameter."""
        w_OI = ops.dequantize_4bit(*self._packed, self._codebook, self._block_size, list(self._size), self._dtype)
        return w_OI.T if self._transposed else w_OI

    def product(self, x_BI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """`x_BI @ w_OI.T + bias_O` without a dense copy for the backward."""
        return ops.linear_4bit(x_BI, bias_O, *self._packed, self._codebook, self._block_size, self._size[0])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copying and pickling look for, also before there is anything to decode
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Multiply by the packed weight where the call is a product with it; anything else gets the dense one."""
        kwargs = kwargs or {}
        if len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            x_BI, weight, *bias = args
            if func is functional.linear and not weight._transposed:
                return weight.product(x_BI, bias[0] if bias else kwargs.get("bias"))
            if func in _PRODUCTS and weight._transposed:
                return weight.product(x_BI)
        return func(*_dense(args), **{key: _dense(value) for key, value in kwargs.items()})


def _dense(value: Any) -> Any:
    """An argument with every packed expert in it, also inside lists, as the dense tensor."""
    if isinstance(value, PackedExpert):
        return value.dense()
    return type(value)(map(_dense, value)) if type(value) in (list, tuple) else value

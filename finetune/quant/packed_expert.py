"""One expert of a packed stack as an operand of torch's own products.

Shape suffixes: B tokens of an expert, O out features, I in features.

The eager expert loop of transformers multiplies by `experts[e]` with `F.linear` or `@`. Given a dense tensor, autograd
would keep it until the backward: in the end every expert of a layer in 16 bits. This operand hands those two calls to
`operand_linear`, which keeps the packed tensors and decodes again. It is no tensor; torch passes it such calls by
`__torch_function__` (torch's notes, "Extending torch native API with a Tensor-like type").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.kernels.operand import Operand
from finetune.kernels.operand_linear import operand_linear

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class PackedExpert:
    """A weight w_OI (w_IO where `transposed`) that is decoded only where it is used.

    Args:
        operand: the codes and scales of this expert alone.
        decode: the dense w_OI, for any call that is no product.
    """

    def __init__(self, operand: Operand, decode: Callable[[], Tensor], transposed: bool) -> None:
        self._operand, self._decode, self._transposed = operand, decode, transposed

    def dense(self) -> Tensor:
        """The decoded weight in the layout of the parameter."""
        w_OI = self._decode()
        return w_OI.T if self._transposed else w_OI

    def product(self, x_BI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """`x_BI @ w_OI.T + bias_O` without a dense copy for the backward."""
        return operand_linear(x_BI, bias_O, self._operand)

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

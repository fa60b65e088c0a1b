"""The operators of a storage format on a CPU, from the C functions of its decoder: `ft_<name>_decode`, `_linear` and
`_input_gradient`.

Shape suffixes: B leading dimensions, O out features, I in features.

In bf16 the engines decode a panel at a time; where they have no answer, and in other dtypes, the weight is decoded into
a reused buffer for torch's product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.kernels import native
from finetune.kernels.scratch import gradient_by_scratch, linear_by_scratch

_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Stored(ctypes.Structure):
    """A frozen weight as its C functions take it. A format has a sub-class with the fields of its own struct.

    Attributes:
        name: in the names of the functions.
        in_features: one of the fields.
        alive: the tensors that other fields point to.
    """

    name: ClassVar[str]
    in_features: int
    alive: tuple[Tensor | None, ...]


def addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """Where tensors lie; null for those that are not there."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@cache
def _functions(name: str) -> tuple[Any, Any, Any]:
    """Decoding, the product and the gradient, with their signatures."""
    library = native.library()
    assert library is not None
    decode, linear, gradient = (
        getattr(library, f"ft_{name}_{what}") for what in ("decode", "linear", "input_gradient")
    )
    decode.argtypes, decode.restype = [_pointer, _int64, _int32, _pointer, _int32], None
    linear.argtypes, linear.restype = [_pointer, _int64, _int64, *[_pointer] * 3, _int32], _int32
    gradient.argtypes, gradient.restype = [_pointer, _int64, _int64, *[_pointer] * 2, _int32], _int32
    return decode, linear, gradient


def decode_into(out: Tensor, weight: Stored) -> None:
    """Decode a weight into a contiguous tensor of any shape that ends in rows."""
    rows = out.numel() // max(weight.in_features, 1)
    decode = _functions(weight.name)[0]
    decode(ctypes.byref(weight), rows, native.DTYPES[out.dtype], out.data_ptr(), native.threads())


def linear(x: Tensor, bias: Tensor | None, weight: Stored, out_features: int) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` in the dtype of `x`."""
    rows = prod(x.shape[:-1])
    if x.dtype == torch.bfloat16:
        y = x.new_empty([*x.shape[:-1], out_features])
        given, added = x.contiguous(), None if bias is None else bias.contiguous()
        pointers = (given.data_ptr(), None if added is None else added.data_ptr(), y.data_ptr())
        product = _functions(weight.name)[1]
        if product(ctypes.byref(weight), rows, out_features, *pointers, native.threads()):
            return y
    return linear_by_scratch(x, bias, (out_features, x.shape[-1]), decode_into, [weight])


def input_gradient(grad: Tensor, weight: Stored, in_features: int) -> Tensor:
    """`grad_BO @ w_OI` in the dtype of `grad`."""
    rows = prod(grad.shape[:-1])
    if grad.dtype == torch.bfloat16:
        result = grad.new_empty([*grad.shape[:-1], in_features])
        given = grad.contiguous()
        pointers = (given.data_ptr(), result.data_ptr())
        product = _functions(weight.name)[2]
        if product(ctypes.byref(weight), rows, grad.shape[-1], *pointers, native.threads()):
            return result
    return gradient_by_scratch(grad, (grad.shape[-1], in_features), decode_into, [weight])


def serve(name: str, make: Callable[..., Stored], references: Sequence[Callable[..., Tensor]]) -> None:
    """Register `dequantize_`, `linear_` and `input_gradient_<name>` for the CPU, where the library is.

    Args:
        make: the weight from the operator's storage arguments and the number of inputs.
        references: the three operators in plain torch, for dtypes that the library does not serve.
    """
    if native.library() is None:
        return
    plain_dequantize, plain_linear, plain_gradient = references

    @torch.library.impl(f"finetune::dequantize_{name}", "cpu")
    def dequantize(*arguments: Any) -> Tensor:
        *storage, shape, dtype = arguments
        if dtype not in native.DTYPES:
            return plain_dequantize(*arguments)
        out = torch.empty(shape, dtype=dtype)
        decode_into(out, make(*storage, out.shape[-1]))
        return out

    @torch.library.impl(f"finetune::linear_{name}", "cpu")
    def product(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        *storage, out_features = arguments
        if x.dtype not in native.DTYPES:
            return plain_linear(x, bias, *arguments)
        return linear(x, bias, make(*storage, x.shape[-1]), out_features)

    @torch.library.impl(f"finetune::input_gradient_{name}", "cpu")
    def gradient(grad: Tensor, *arguments: Any) -> Tensor:
        *storage, in_features = arguments
        if grad.dtype not in native.DTYPES:
            return plain_gradient(grad, *arguments)
        return input_gradient(grad, make(*storage, in_features), in_features)

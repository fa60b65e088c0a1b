"""The compiled kernels of weights in integer codes: operators of kernels/affine.py and kernels/int8.py on a CPU.

Shape suffixes: B leading dimensions, O out features, I in features, G groups of a row, P packed bytes of a row.

In bf16 the engines decode a panel at a time; where they have no answer, and in other dtypes, the weight is decoded into
a reused buffer for torch's product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from finetune.kernels import native
from finetune.kernels.scratch import gradient_by_scratch, linear_by_scratch

MIDDLE, INTEGER, REAL, SIGNED = range(4)
"""Kinds of zero points, as csrc/integer.h numbers them."""

_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Integer(ctypes.Structure):
    """`finetune::Integer` of csrc/integer.h; keeps its tensors alive."""

    _fields_ = [
        ("codes", _pointer),
        ("scale", _pointer),
        ("zero", _pointer),
        ("in_features", _int64),
        ("group", _int64),
        ("groups", _int64),
        ("bytes", _int64),
        ("bits", _int32),
        ("scale_type", _int32),
        ("zeros", _int32),
    ]
    kept: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, width: int, bits: int, group: int, kind: int) -> Any:
        """A weight whose rows are the last dimension of `codes`; `group` inputs under a scale, -1 for all."""
        codes, scale = codes.contiguous(), scale.contiguous()
        zero = None if zero is None else zero.contiguous()
        groups = 1 if group < 0 else -(-width // group)
        made = cls(
            codes.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr(), width,
            width if groups == 1 else group, groups, codes.shape[-1], bits, native.DTYPES[scale.dtype], kind,
        )  # fmt: skip
        made.kept = (codes, scale, zero)
        return made


@cache
def _library() -> ctypes.CDLL:
    """The library with the signatures of this file's functions set."""
    found = native.library()
    assert found is not None
    weight = ctypes.POINTER(Integer)
    found.ft_integer_decode.argtypes = [weight, _int64, _int32, _pointer, _int32]
    found.ft_integer_decode.restype = None
    found.ft_integer_encode.argtypes = [weight, _int64, _pointer, _int32, _pointer, _int32]
    found.ft_integer_encode.restype = None
    found.ft_integer_linear.argtypes = [weight, _int64, _int64, *[_pointer] * 3, _int32]
    found.ft_integer_linear.restype = _int32
    found.ft_integer_input_gradient.argtypes = [weight, _int64, _int64, *[_pointer] * 2, _int32]
    found.ft_integer_input_gradient.restype = _int32
    return found


def affine(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, width: int) -> Integer:
    """The stored tensors of kernels/affine.py as the library takes them."""
    kind = MIDDLE if zero is None else REAL if zero.is_floating_point() else INTEGER
    return Integer.of(codes, scale, zero, width, bits, group_size, kind)


def int8(codes: Tensor, absmax: Tensor, width: int) -> Integer:
    """The stored tensors of kernels/int8.py as the library takes them."""
    return Integer.of(codes, absmax, None, width, 8, -1, SIGNED)


def decode_into(out: Tensor, weight: Integer) -> None:
    """Decode a weight into a contiguous tensor of any shape that ends in rows."""
    rows = out.numel() // max(weight.in_features, 1)
    _library().ft_integer_decode(weight, rows, native.DTYPES[out.dtype], out.data_ptr(), native.threads())


def encode_affine(
    w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, group_size: int, packed_width: int
) -> Tensor | None:
    """The nearest codes of a matrix for given scales and zero points, packed, uint8 [O, P]; None where not served."""
    if native.library() is None or w_OI.device.type != "cpu" or w_OI.dtype not in native.DTYPES:
        return None
    w_OI = w_OI.contiguous()
    codes_OP = torch.empty(w_OI.shape[0], packed_width, dtype=torch.uint8)
    weight = affine(codes_OP, scale_OG, zero_OG, bits, group_size, w_OI.shape[1])
    kind, rows = native.DTYPES[w_OI.dtype], w_OI.shape[0]
    _library().ft_integer_encode(weight, rows, w_OI.data_ptr(), kind, codes_OP.data_ptr(), native.threads())
    return codes_OP


def linear(x: Tensor, bias: Tensor | None, weight: Integer, out_features: int) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` in the dtype of `x`."""
    rows = prod(x.shape[:-1])
    if x.dtype == torch.bfloat16:
        y = x.new_empty([*x.shape[:-1], out_features])
        given, added = x.contiguous(), None if bias is None else bias.contiguous()
        pointers = (given.data_ptr(), None if added is None else added.data_ptr(), y.data_ptr())
        if _library().ft_integer_linear(weight, rows, out_features, *pointers, native.threads()):
            return y
    return linear_by_scratch(x, bias, (out_features, x.shape[-1]), decode_into, [weight])


def input_gradient(grad: Tensor, weight: Integer, in_features: int) -> Tensor:
    """`grad_BO @ w_OI` in the dtype of `grad`."""
    rows = prod(grad.shape[:-1])
    if grad.dtype == torch.bfloat16:
        result = grad.new_empty([*grad.shape[:-1], in_features])
        given = grad.contiguous()
        pointers = (given.data_ptr(), result.data_ptr())
        if _library().ft_integer_input_gradient(weight, rows, grad.shape[-1], *pointers, native.threads()):
            return result
    return gradient_by_scratch(grad, (grad.shape[-1], in_features), decode_into, [weight])


def serve(name: str, make: Callable[..., Integer], references: Sequence[Callable[..., Tensor]]) -> None:
    """Register `dequantize_`, `linear_` and `input_gradient_<name>` for the CPU, where the library is.

    Args:
        make: an `Integer` from the operator's storage arguments and the number of inputs.
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

"""The compiled kernels of the 4-bit codebook formats: operators of kernels/ops.py on a CPU.

Products of bf16 go to the compiled ones where those are the faster (csrc/codebook4_product.cpp says where). Elsewhere,
and for other dtypes, the weight is decoded into a borrowed buffer, in the dtype of the input, and torch multiplies.

Shape suffixes: B leading dimensions, O out features, I in features, N weights, G blocks, P packed bytes.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from finetune.kernels import codebook as books
from finetune.kernels import native, pages, reference, scratch

_CPU = torch.device("cpu")
_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_STORAGE = [*[_pointer] * 6, _int32]
_SIGNATURES = {
    "ft_dequantize_codebook4": ([*_STORAGE, _int64, _int32, _pointer, _int32, _int32], None),
    "ft_linear_codebook4": ([*_STORAGE, *[_int64] * 3, *[_pointer] * 3, _int32], _int32),
    "ft_input_gradient_codebook4": ([*_STORAGE, *[_int64] * 3, *[_pointer] * 2, _int32], _int32),
    "ft_quantize_codebook4": ([_pointer, _int32, _int64, _int32, *[_pointer] * 4, _int32], None),
}


def register() -> None:
    """Put the kernels before the reference, where there is a compiled library."""
    if native.library() is None:
        return
    torch.library.impl("finetune::dequantize_4bit", "cpu")(_dequantize)
    torch.library.impl("finetune::linear_4bit", "cpu")(_linear)
    torch.library.impl("finetune::input_gradient_4bit", "cpu")(_input_gradient)
    torch.library.impl("finetune::quantize_4bit", "cpu")(_quantize)


@cache
def _library() -> ctypes.CDLL:
    """The library with the signatures of this file's functions set."""
    found = native.library()
    assert found is not None
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found


@cache
def _values(codebook: str) -> tuple[int, int]:
    """Addresses of the dynamic map and of a codebook's table, which the caches of `books` keep alive."""
    return books.dynamic_map(_CPU).data_ptr(), books.table(codebook, _CPU).data_ptr()


@cache
def _decision(codebook: str) -> tuple[Tensor, Tensor]:
    """The midpoints of a codebook's sorted values, float32 [15], and their codes, uint8 [16]."""
    with torch.inference_mode(False):
        values, order = books.table(codebook, _CPU).sort(stable=True)
        return books.midpoints(values), order.to(torch.uint8)


class _Storage:
    """The stored tensors as arguments of C functions, kept alive."""

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        codebook: str,
        block_size: int,
    ) -> None:
        stored = (packed, absmax, nested_absmax, offset)
        self.kept = tuple(None if tensor is None else tensor.contiguous() for tensor in stored)
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in self.kept)
        self.arguments = (*addresses, *_values(codebook), block_size)


def _dequantize(*storage_shape_dtype: Any) -> Tensor:
    *storage, shape, dtype = storage_shape_dtype
    if dtype not in native.DTYPES:
        codebook, block_size = storage[4:]
        return reference.dequantize_4bit(reference.Packed4bit(*storage[:4]), codebook, block_size, shape, dtype)
    out, recycled = pages.empty(shape, dtype)
    _decode(out, _Storage(*storage), recycled)
    return out


def _decode(out: Tensor, storage: _Storage, recycled: bool) -> None:
    _library().ft_dequantize_codebook4(
        *storage.arguments, out.numel(), native.DTYPES[out.dtype], out.data_ptr(), recycled, native.threads()
    )


def _decode_into(out: Tensor, *storage: Any) -> None:
    """As the products' fallback wants it: into a buffer that they use again and again."""
    if out.dtype in native.DTYPES:
        _decode(out, _Storage(*storage), True)
    else:
        out.copy_(_dequantize(*storage, list(out.shape), out.dtype))


def _linear(x_BI: Tensor, bias_O: Tensor | None, *storage_and_width: Any) -> Tensor:
    *storage, out_features = storage_and_width
    in_features = x_BI.shape[-1]
    if _served(x_BI, bias_O):
        x_BI, bias_O = x_BI.contiguous(), None if bias_O is None else bias_O.contiguous()
        y_BO = x_BI.new_empty([*x_BI.shape[:-1], out_features])
        stored = _Storage(*storage)
        bias = None if bias_O is None else bias_O.data_ptr()
        rows = x_BI.numel() // in_features
        sizes = (rows, out_features, in_features)
        if _library().ft_linear_codebook4(
            *stored.arguments, *sizes, x_BI.data_ptr(), bias, y_BO.data_ptr(), native.threads()
        ):
            return y_BO
    return scratch.linear_by_scratch(x_BI, bias_O, (out_features, in_features), _decode_into, storage)


def _input_gradient(grad_BO: Tensor, *storage_and_width: Any) -> Tensor:
    *storage, in_features = storage_and_width
    out_features = grad_BO.shape[-1]
    if _served(grad_BO, None):
        grad_BO = grad_BO.contiguous()
        grad_BI = grad_BO.new_empty([*grad_BO.shape[:-1], in_features])
        stored = _Storage(*storage)
        sizes = (grad_BO.numel() // out_features, out_features, in_features)
        if _library().ft_input_gradient_codebook4(
            *stored.arguments, *sizes, grad_BO.data_ptr(), grad_BI.data_ptr(), native.threads()
        ):
            return grad_BI
    return scratch.gradient_by_scratch(grad_BO, (out_features, in_features), _decode_into, storage)


def _served(x_BI: Tensor, bias_O: Tensor | None) -> bool:
    """Whether the compiled products may be asked."""
    return x_BI.dtype == torch.bfloat16 and x_BI.numel() > 0 and (bias_O is None or bias_O.dtype == torch.bfloat16)


def _quantize(weight: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    encode = _encode if weight.dtype in native.DTYPES else reference.encode_4bit
    packed = reference.quantize_4bit(weight, codebook, block_size, False, encode)
    return packed.codes_P1, packed.absmax_G


def _encode(flat_N: Tensor, codebook: str, block_size: int, codes_P: Tensor, absmax_G: Tensor) -> None:
    """As `reference.encode_4bit`."""
    flat_N = flat_N.contiguous()
    midpoints, order = _decision(codebook)
    _library().ft_quantize_codebook4(
        flat_N.data_ptr(),
        native.DTYPES[flat_N.dtype],
        flat_N.numel(),
        block_size,
        midpoints.data_ptr(),
        order.data_ptr(),
        codes_P.data_ptr(),
        absmax_G.data_ptr(),
        native.threads(),
    )

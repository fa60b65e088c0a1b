"""The compiled kernels of int8 products: `finetune::llm_int8` and `int8_product` on a CPU, with the reference's bits.

Shape suffixes: M rows of the input, O out features, I in features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from finetune.kernels import native

_pointer, _int32, _int64, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float

SCALED = (torch.float32, torch.bfloat16)
"""dtypes that the library scales an int32 product to."""

LEAST_COLUMNS = 16
"""Of torch's int8 product: with one column (torch 2.13 on a CPU) it is wrong, and small ones are no loss."""

Outliers = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`outliers(x_MI, outlier_I, codes_OI, absmax_O)`: what outlier columns add, [M, O]."""


@cache
def _library() -> ctypes.CDLL:
    """The library with the signatures of this file's functions set."""
    found = native.library()
    assert found is not None
    found.ft_int8_rows.argtypes = [_pointer, _int32, _int64, _int64, _float, *[_pointer] * 3, _int32]
    found.ft_int8_rows.restype = _int64
    found.ft_int8_product.argtypes = [*[_pointer] * 3, *[_int64] * 3, _int32]
    found.ft_int8_product.restype = _int32
    found.ft_int8_scale.argtypes = [*[_pointer] * 6, _int32, _int64, _int64, _int32]
    found.ft_int8_scale.restype = None
    return found


def quantize_rows(x_MI: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Codes int8 [M, I], absmax float32 [M], marks of outlier columns uint8 [I], and how many columns are marked."""
    rows, width = x_MI.shape
    codes, absmax = x_MI.new_empty(rows, width, dtype=torch.int8), x_MI.new_empty(rows, dtype=torch.float32)
    outlier = x_MI.new_empty(width, dtype=torch.uint8)
    pointers = (codes.data_ptr(), absmax.data_ptr(), outlier.data_ptr())
    kind = native.DTYPES[x_MI.dtype]
    count = _library().ft_int8_rows(x_MI.data_ptr(), kind, rows, width, threshold, *pointers, native.threads())
    return codes, absmax, outlier, count


def quantize_weight(w_OI: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes int8 [O, I] and absmax float32 [O]; None where the library does not serve the weight."""
    if native.library() is None or w_OI.device.type != "cpu" or w_OI.dtype not in native.DTYPES or not w_OI.numel():
        return None
    codes, absmax, _, _ = quantize_rows(w_OI.contiguous(), 0.0)
    return codes, absmax


@cache
def vendor_is_exact() -> bool:
    """Whether torch's int8 product is exact here: without VNNI it adds pairs of products in 16 bits and saturates."""
    codes = torch.full((32, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.T) == 127 * 127 * 256).all())


def product(codes_MI: Tensor, codes_OI: Tensor, otherwise: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`codes_MI @ codes_OI.T` in int32, exact.

    Args:
        otherwise: an exact product in plain torch.
    """
    rows, (out_features, width) = codes_MI.shape[0], codes_OI.shape
    y_MO = codes_MI.new_empty(rows, out_features, dtype=torch.int32)
    pointers = (codes_MI.data_ptr(), codes_OI.data_ptr(), y_MO.data_ptr())
    if _library().ft_int8_product(*pointers, rows, out_features, width, native.threads()):
        return y_MO
    if width < LEAST_COLUMNS or not vendor_is_exact():
        return otherwise(codes_MI, codes_OI)
    return torch._int_mm(codes_MI, codes_OI.T)


def serve(
    reference: Callable[..., Tensor], exact_product: Callable[[Tensor, Tensor], Tensor], outliers: Outliers
) -> None:
    """Register `llm_int8` and `int8_product` for the CPU, where the library is.

    Args:
        reference: the operator in plain torch, for dtypes that the library does not serve.
        exact_product, outliers: its parts.
    """
    if native.library() is None:
        return

    @torch.library.impl("finetune::int8_product", "cpu")
    def codes_by_codes(codes_m: Tensor, codes_o: Tensor) -> Tensor:
        return product(codes_m.contiguous(), codes_o.contiguous(), exact_product)

    @torch.library.impl("finetune::llm_int8", "cpu")
    def llm_int8(x: Tensor, bias: Tensor | None, codes: Tensor, absmax: Tensor, threshold: float) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1]).contiguous()
        if x.dtype not in SCALED or not x_MI.numel():
            return reference(x, bias, codes, absmax, threshold)
        codes, absmax = codes.contiguous(), absmax.contiguous()
        codes_MI, absmax_M, outlier_I, count = quantize_rows(x_MI, threshold)
        product_MO = product(codes_MI, codes, exact_product)
        extra_MO = None
        if count:
            with torch.autocast("cpu", enabled=False):
                extra_MO = outliers(x_MI, outlier_I, codes, absmax).contiguous()
        added_O = None if bias is None else bias.contiguous()
        y_BO = torch.empty(*x.shape[:-1], codes.shape[0], dtype=x.dtype)  # no view: models add to it
        stored = (product_MO, absmax_M, absmax, added_O, extra_MO, y_BO)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in stored]
        _library().ft_int8_scale(*pointers, native.DTYPES[x.dtype], *product_MO.shape, native.threads())
        return y_BO

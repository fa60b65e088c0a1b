"""int8 by rows on a GPU: decode, linear, its input gradient, and LLM.int8()'s product of integers.

Shape suffixes: M rows, O out features, I in features.

Weight-only as the 4-bit formats: fused for few rows, else by scratch. `llm_int8` (Dettmers et al. 2022,
arXiv:2208.07339) multiplies codes by codes on the matrix units where torch offers it (`torch._int_mm`), which wants
more than 16 rows and widths in eights; rows are filled up with zeros, and other widths go to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels import dispatch, int8
from finetune.kernels.products import owned
from finetune.kernels.scratch import gradient_by_scratch, linear_by_scratch
from finetune.kernels.triton_backend import EXACT, by_rows, flat_bytes, on
from finetune.kernels.triton_product import Format, fused_product

STEP = 1 / int8.LEVELS
"""What an absmax is multiplied by to give the value of code 1."""
LEAST_ROWS = 32
"""Rows that `torch._int_mm` surely takes: more than 16, a multiple of 8."""


@triton.jit
def _dequantize(out, codes, absmax, I, STEP: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # noqa: E741
    """Grid: rows, pieces of a row."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(absmax + row) * STEP
    for step in tl.static_range(STEPS):
        column = (tl.program_id(1) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(codes + row * I + column, mask=column < I, other=0).to(tl.float32) * scale
        tl.store(out + row * I + column, value.to(out.dtype.element_ty), mask=column < I)


@triton.jit
def _weights(codes, storage, rows, k0, I: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr):  # noqa: E741
    scale, _ = _scales(storage, rows, k0, I, FORMAT)
    return _values(codes, storage, tl.float32, FORMAT) * scale[:, None]


@triton.jit
def _values(codes, storage, dtype: tl.constexpr, FORMAT: tl.constexpr):
    return ((codes ^ 128) - 128).to(tl.float32).to(dtype)  # codes come unsigned; in bfloat16 they are exact


@triton.jit
def _scales(storage, rows, k0, I: tl.constexpr, FORMAT: tl.constexpr):  # noqa: E741
    scale = tl.load(storage[0] + rows) * FORMAT[0]
    return scale, scale


FORMAT = Format(8, False, _weights, _values, _scales, False, -1, (STEP,))


def decode_into(out: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """Decode into a contiguous tensor [.., O, I] of float32, bfloat16 or float16."""
    if not out.numel():
        return
    rows = by_rows(out)
    with on(out):
        _dequantize[rows.grid](
            out, flat_bytes(codes), flat_bytes(absmax), out.shape[-1], STEP, rows.block, rows.steps, **EXACT
        )


def dequantize(codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """`finetune::dequantize_int8`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    # The scales go by rows of the codes, whatever shape is asked for.
    decode_into(out.view(codes.shape), codes, absmax)
    return out


def linear(x_BI: Tensor, bias_O: Tensor | None, codes: Tensor, absmax: Tensor, out_features: int) -> Tensor:
    """`finetune::linear_int8`: fused for few rows, else by scratch."""
    in_features = x_BI.shape[-1]
    x_MI = x_BI.reshape(-1, in_features).contiguous()
    plan = dispatch.choose("int8", len(x_MI), out_features, in_features, x_MI.dtype, x_MI.device)
    if plan is None or not len(x_MI) or codes.data_ptr() % 4:
        return linear_by_scratch(x_BI, bias_O, (out_features, in_features), decode_into, (codes, absmax))
    return owned(fused(plan, x_MI, bias_O, codes, absmax).view(*x_BI.shape[:-1], out_features))


def fused(plan: dispatch.Fused, x_MI: Tensor, bias_O: Tensor | None, codes: Tensor, absmax: Tensor) -> Tensor:
    """The product with the decoding inside; in features a multiple of 32, the codes on a 4-byte address."""
    words = flat_bytes(codes).view(torch.int32)
    return fused_product(FORMAT, plan, x_MI, bias_O, words, (flat_bytes(absmax),), codes.shape[0])


def input_gradient(grad_BO: Tensor, *storage_and_width: Any) -> Tensor:
    """`finetune::input_gradient_int8`, by scratch."""
    *storage, in_features = storage_and_width
    return gradient_by_scratch(grad_BO, (grad_BO.shape[-1], in_features), decode_into, storage)


def llm_int8(x: Tensor, bias: Tensor | None, codes: Tensor, absmax: Tensor, threshold: float) -> Tensor:
    """`finetune::llm_int8`: the reference, its product of codes on the matrix units."""
    return int8.llm_int8_by(integer_product, x, bias, codes, absmax, threshold)


def integer_product(codes_MI: Tensor, codes_OI: Tensor) -> Tensor:
    """`codes_MI @ codes_OI.T` in int32, exact."""
    if codes_OI.shape[0] % 8 or codes_OI.shape[1] % 8 or not hasattr(torch, "_int_mm"):
        return int8.product(codes_MI, codes_OI)
    rows = len(codes_MI)
    missing = max(LEAST_ROWS, rows + -rows % 8) - rows
    filled = torch.nn.functional.pad(codes_MI, (0, 0, 0, missing)) if missing else codes_MI
    return torch._int_mm(filled, codes_OI.T)[:rows]

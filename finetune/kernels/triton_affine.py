"""Affine integer codes in groups on a GPU: decode (2, 3, 4, 8 bits), linear (4 and 8 bits fused), its input gradient.

Shape suffixes: M rows, O out features, I in features, G groups of a row, P packed bytes of a row.

The formulas are those of kernels/affine.py: `(q - 2^(bits-1)) scale`, `(q - zero) scale` or `q scale + zero`, each
operation rounded on its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels import dispatch
from finetune.kernels.products import owned
from finetune.kernels.scratch import gradient_by_scratch, linear_by_scratch
from finetune.kernels.triton_backend import EXACT, by_rows, flat_bytes, on
from finetune.kernels.triton_product import Format, fused_product

FUSED_BITS = (4, 8)
SYMMETRIC, INTEGER, REAL = 0, 1, 2
"""How a zero point is meant: none, an integer, a real number."""


@triton.jit
def _value(code, scale, zero, KIND: tl.constexpr, BITS: tl.constexpr):
    """Float32 weights; KIND as above."""
    if KIND == 0:
        value = (code - (1 << (BITS - 1))).to(tl.float32) * scale
    elif KIND == 1:
        value = (code.to(tl.float32) - zero) * scale
    else:
        value = code.to(tl.float32) * scale + zero
    return value


@triton.jit
def _dequantize(
    out, codes, scale, zero, I, P, G, GROUP: tl.constexpr,  # noqa: E741
    BITS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Grid: rows, pieces of a row. A code of 3 bits may cross into a second byte."""
    row = tl.program_id(0).to(tl.int64)
    for step in tl.static_range(STEPS):
        column = (tl.program_id(1) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = column < I
        bit = column * BITS
        code = tl.load(codes + row * P + bit // 8, mask=inside, other=0).to(tl.int32)
        if BITS == 3:
            crosses = inside & (bit % 8 > 5)
            code |= tl.load(codes + row * P + bit // 8 + 1, mask=crosses, other=0).to(tl.int32) << 8
        code = (code >> (bit % 8)) & ((1 << BITS) - 1)
        group = row * G + column // GROUP
        s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
        z = s if KIND == 0 else tl.load(zero + group, mask=inside, other=0).to(tl.float32)
        tl.store(out + row * I + column, _value(code, s, z, KIND, BITS).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weights(codes, storage, rows, k0, I: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr):  # noqa: E741
    """No group ends within 32 columns, so there is a scale for each row and 32 columns."""
    BITS: tl.constexpr = FORMAT[0]
    KIND: tl.constexpr = FORMAT[1]
    GROUP: tl.constexpr = FORMAT[2]
    BO: tl.constexpr = rows.shape[0]
    GROUPS: tl.constexpr = (I + GROUP - 1) // GROUP
    group = rows[:, None] * GROUPS + (k0 + 32 * tl.arange(0, BK // 32)[None, :]) // GROUP
    scale = tl.load(storage[0] + group).to(tl.float32)[:, :, None]
    zero = scale if KIND == 0 else tl.load(storage[1] + group).to(tl.float32)[:, :, None]
    return _value(codes.reshape(BO, BK // 32, 32), scale, zero, KIND, BITS).reshape(BO, BK)


@triton.jit
def _values(codes, storage, dtype: tl.constexpr, FORMAT: tl.constexpr):
    return codes.to(tl.float32).to(dtype)  # up to 255: exact in bfloat16


@triton.jit
def _scales(storage, rows, k0, I: tl.constexpr, FORMAT: tl.constexpr):  # noqa: E741
    """Each kind of zero point as `code * scale + shift`."""
    BITS: tl.constexpr = FORMAT[0]
    KIND: tl.constexpr = FORMAT[1]
    GROUP: tl.constexpr = FORMAT[2]
    group = rows * ((I + GROUP - 1) // GROUP) + k0 // GROUP
    scale = tl.load(storage[0] + group).to(tl.float32)
    if KIND == 0:
        shift = scale * -(1 << (BITS - 1))
    elif KIND == 1:
        shift = -tl.load(storage[1] + group).to(tl.float32) * scale
    else:
        shift = tl.load(storage[1] + group).to(tl.float32)
    return scale, shift


def kind_of(zero: Tensor | None) -> int:
    """How a zero point is meant, by its dtype."""
    if zero is None:
        return SYMMETRIC
    return REAL if zero.is_floating_point() else INTEGER


def decode_into(out: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> None:
    """Decode into a contiguous tensor [.., O, I] of float32, bfloat16 or float16."""
    if not out.numel():
        return
    width = out.shape[-1]
    group = width if group_size < 0 else group_size
    rows = by_rows(out)
    with on(out):
        _dequantize[rows.grid](
            out, flat_bytes(codes), flat_bytes(scale), flat_bytes(scale if zero is None else zero), width,
            codes.shape[-1], scale.shape[-1], group, bits, kind_of(zero), rows.block, rows.steps, **EXACT,
        )  # fmt: skip


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """`finetune::dequantize_affine`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    decode_into(out, codes, scale, zero, bits, group_size)
    return out


def linear(x_BI: Tensor, bias_O: Tensor | None, *storage_and_width: Any) -> Tensor:
    """`finetune::linear_affine`: fused for few rows of 4 and 8 bits, else by scratch."""
    *storage, out_features = storage_and_width
    in_features = x_BI.shape[-1]
    x_MI = x_BI.reshape(-1, in_features).contiguous()
    plan = None
    if fusible(in_features, *storage) and len(x_MI):
        plan = dispatch.choose("affine", len(x_MI), out_features, in_features, x_MI.dtype, x_MI.device)
    if plan is None:
        return linear_by_scratch(x_BI, bias_O, (out_features, in_features), decode_into, storage)
    return owned(fused(plan, x_MI, bias_O, *storage).view(*x_BI.shape[:-1], out_features))


def fusible(in_features: int, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> bool:
    """Whether the fused kernel can read this: whole words, and no group ending within 32 columns."""
    aligned = codes.data_ptr() % 4 == 0 and in_features % 32 == 0
    return bits in FUSED_BITS and aligned and (group_size < 0 or group_size % 32 == 0)


def fused(
    plan: dispatch.Fused,
    x_MI: Tensor,
    bias_O: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """The product with the decoding inside, where `fusible`."""
    group = x_MI.shape[1] if group_size < 0 else group_size
    width = group & -group  # a tile is a power of two that divides the group
    form = Format(bits, False, _weights, _values, _scales, True, width, (bits, kind_of(zero), group))
    storage = (flat_bytes(scale), flat_bytes(scale if zero is None else zero))  # without a zero point it is not read
    words = flat_bytes(codes).view(torch.int32)
    return fused_product(form, plan, x_MI, bias_O, words, storage, codes.shape[0])


def input_gradient(grad_BO: Tensor, *storage_and_width: Any) -> Tensor:
    """`finetune::input_gradient_affine`, by scratch."""
    *storage, in_features = storage_and_width
    return gradient_by_scratch(grad_BO, (grad_BO.shape[-1], in_features), decode_into, storage)

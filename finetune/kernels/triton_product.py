"""Fused decode and multiply for few rows, for any format of integer codes: each packed byte is read once.

Shape suffixes: M rows of the input, O out features, I in features; in a program BM, BO, BK of them.

`y_MO = x_MI @ w_OI.T + bias_O`. A program decodes a tile [BO, BK] of the weight into registers and multiplies it by BM
rows: with the matrix units in 16 bits (`dot`), by plain sums in float32 (`sum`). The in features may be cut into parts
(split-K): each part writes float32 sums of its own, added up in a fixed order afterwards, so that the same call always
gives the same bits.

**Scales.** The matrix units multiply codes (or entries of the codebook, rounded to 16 bits), and the product of a tile
no wider than a group is scaled in float32: integers are exact that way, and it saves a multiplication and a conversion
a weight, which are what limits these kernels once the codes are read only once.

**Order of the columns.** Codes are loaded as 32-bit words. In the layout of the matrix units a thread owns the columns
2 t, 2 t + 1, 8 + 2 t, 8 + 2 t + 1, .. of a row. A sum does not care for the order of its terms, so column
`8 j + 2 t + b` of the tile stands for code `2 j + b` of word t: whole words fall to one thread, and the input's columns
are loaded in the same order. This halves the instructions a weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.dispatch import Fused
from finetune.kernels.triton_backend import INTERPRETED, on

_PIECE = 1024
"""Sums that a program adds the parts of."""


@triton.jit
def _codes(words, rows, k0, I: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, HIGH_FIRST: tl.constexpr):  # noqa: E741
    """Codes of a tile [BO, BK] as int32, columns in the order above. `words` is int32, `rows` int64."""
    WORD: tl.constexpr = 32 // BITS
    columns = k0 // WORD + tl.arange(0, BK // WORD)
    word = tl.load(words + rows[:, None] * (I // WORD) + columns[None, :])
    word = word.reshape(rows.shape[0], BK // (4 * WORD), 1, 4)
    shift = (tl.arange(0, WORD // 2) * (2 * BITS))[None, None, :, None]
    MASK: tl.constexpr = (1 << BITS) - 1
    even, odd = (word >> shift) & MASK, (word >> (shift + BITS)) & MASK
    if HIGH_FIRST:
        codes = tl.join(odd, even)
    else:
        codes = tl.join(even, odd)
    return codes.reshape(rows.shape[0], BK)


@triton.jit
def _order(k, WORD: tl.constexpr):
    """The column of the weight that column k of a tile stands for."""
    inner = k % (4 * WORD)
    return k - inner + (inner // 2) % 4 * WORD + inner // 8 * 2 + inner % 2


@triton.jit
def _store(sums, y, bias, part, o, m, M, O):  # noqa: E741
    """Write a tile; where I has several parts, y is float32 [parts, M, O] and there is no bias."""
    if bias is not None:
        sums += tl.load(bias + tl.minimum(o, O - 1)).to(tl.float32)[:, None]
    target = y + (part * M + m[None, :]).to(tl.int64) * O + o[:, None]
    tl.store(target, sums.to(y.dtype.element_ty), mask=(m[None, :] < M) & (o[:, None] < O))


@triton.jit
def _add_up(parts, y, bias, count, O, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: E741
    """y = the sum of [PARTS, count], first to last, and the bias."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * count + index, mask=index < count, other=0.0)
    if bias is not None:
        total += tl.load(bias + index % O, mask=index < count, other=0.0).to(tl.float32)
    tl.store(y + index, total.to(y.dtype.element_ty), mask=index < count)


@triton.jit
def _sum(
    x, y, bias, words, storage, M, O, I: tl.constexpr, BITS: tl.constexpr, HIGH_FIRST: tl.constexpr,  # noqa: E741
    FORMAT: tl.constexpr, WEIGHTS: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """A few rows of float32 by plain sums. Grid: tiles of O, parts of I, tiles of M."""
    part = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    rows = tl.minimum(o, O - 1).to(tl.int64)  # rows beyond the end decode the last one, and are not stored
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    TOTAL: tl.constexpr = I // BK
    order = _order(tl.arange(0, BK), 32 // BITS)
    sums = tl.zeros((BO, BM), tl.float32)
    for step in range(0, CHUNKS):
        chunk = part * CHUNKS + step
        k0 = tl.minimum(chunk, TOTAL - 1) * BK
        w = WEIGHTS(_codes(words, rows, k0, I, BK, BITS, HIGH_FIRST), storage, rows, k0, I, BK, FORMAT)
        inside = (m[None, :] < M) & (chunk < TOTAL)
        xt = tl.load(x + m[None, :].to(tl.int64) * I + (k0 + order)[:, None], mask=inside, other=0.0)
        sums += tl.sum(w[:, :, None] * xt.to(tl.float32)[None, :, :], axis=1)
    _store(sums, y, bias, part, o, m, M, O)


@triton.jit
def _dot(
    x, y, bias, words, storage, M, O, I: tl.constexpr, BITS: tl.constexpr, HIGH_FIRST: tl.constexpr,  # noqa: E741
    FORMAT: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr, SHIFTED: tl.constexpr, BM: tl.constexpr,
    BO: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of 16 bits by the matrix units, scaled after the product of a tile. Grid as above."""
    part = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    rows = tl.minimum(o, O - 1).to(tl.int64)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    TOTAL: tl.constexpr = I // BK
    order = _order(tl.arange(0, BK), 32 // BITS)
    sums = tl.zeros((BO, BM), tl.float32)
    for step in range(0, CHUNKS):
        chunk = part * CHUNKS + step
        k0 = tl.minimum(chunk, TOTAL - 1) * BK
        inside = (m[None, :] < M) & (chunk < TOTAL)
        xt = tl.load(x + m[None, :].to(tl.int64) * I + (k0 + order)[:, None], mask=inside, other=0.0)
        v = VALUES(_codes(words, rows, k0, I, BK, BITS, HIGH_FIRST), storage, xt.dtype, FORMAT)
        if UPCAST:
            product = tl.dot(v.to(tl.float32), xt.to(tl.float32), input_precision="ieee")
        else:
            product = tl.dot(v, xt)
        scale, shift = SCALES(storage, rows, k0, I, FORMAT)
        sums += product * scale[:, None]
        if SHIFTED:
            sums += tl.sum(xt.to(tl.float32), axis=0)[None, :] * shift[:, None]
    _store(sums, y, bias, part, o, m, M, O)


class Format(NamedTuple):
    """How a storage format is read inside a product.

    Attributes:
        bits: of a code, 8 or 4.
        high_first: whether the first of two codes in a byte is in its upper half.
        weights: Triton function `(codes, storage, rows, k0, I, BK, settings) -> float32 [BO, BK]`, scaled.
        values: `(codes, storage, dtype, settings) -> [BO, BK]` in a dtype of 16 bits, not scaled.
        scales: `(storage, rows, k0, I, settings) -> (scale_BO, shift_BO)` of the columns from k0, in float32.
        shifted: whether a weight is `value * scale + shift`; else the shift is not used.
        group: columns under one scale; a tile of `dot` is no wider. -1 for the whole row.
        settings: constants that all three are compiled with.
    """

    bits: int
    high_first: bool
    weights: Any
    values: Any
    scales: Any
    shifted: bool
    group: int
    settings: tuple[Any, ...]


def fused_product(
    form: Format,
    plan: Fused,
    x_MI: Tensor,
    bias_O: Tensor | None,
    words: Tensor,
    storage: tuple[Tensor, ...],
    out_features: int,
) -> Tensor:
    """`x_MI @ w_OI.T + bias_O` in the dtype of x.

    Args:
        plan: tile sizes; see kernels/dispatch.py. The tile's width must divide the in features.
        x_MI: contiguous.
        words: the codes viewed as int32, rows one after another.
        storage: what else the format reads: scales, tables.
    """
    count, in_features = x_MI.shape
    dot = plan.kernel == "dot"
    block_k = min(plan.block_k, form.group) if dot and form.group > 0 else plan.block_k
    chunks = in_features // block_k
    parts = min(plan.parts(out_features, in_features), chunks)
    each = -(-chunks // parts)
    parts = -(-chunks // each)
    split = parts > 1
    shape = (parts, count, out_features) if split else (count, out_features)
    y = torch.empty(shape, dtype=torch.float32 if split else x_MI.dtype, device=x_MI.device)
    grid = (-(-out_features // plan.block_o), parts, -(-count // plan.block_m))
    common = (x_MI, y, None if split else bias_O, words, storage, count, out_features, in_features, form.bits)
    tiles = (plan.block_m, plan.block_o, block_k, each)
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    with on(x_MI):
        if dot:
            functions = (form.values, form.scales, form.shifted)
            _dot[grid](*common, form.high_first, form.settings, *functions, *tiles, INTERPRETED, **options)
        else:
            _sum[grid](*common, form.high_first, form.settings, form.weights, *tiles, **options)
        return _added_up(y, bias_O, x_MI.dtype) if split else y


def _added_up(parts_PMO: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    parts, count, out_features = parts_PMO.shape
    y_MO = torch.empty(count, out_features, dtype=dtype, device=parts_PMO.device)
    grid = (-(-y_MO.numel() // _PIECE),)
    _add_up[grid](parts_PMO, y_MO, bias_O, y_MO.numel(), out_features, parts, _PIECE)
    return y_MO

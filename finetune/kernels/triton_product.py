"""Fused decode and multiply for few rows, for any format of integer codes: each packed byte is read once.

Shape suffixes: M rows of the input, O out features, I in features; in a program BM, BO, BK of them.

`y_MO = x_MI @ w_OI.T + bias_O`. A program decodes a tile [BO, BK] of the weight into registers and multiplies it by
BM rows: with the matrix units (`dot`), or for one to four rows by plain sums. The rows of `I` may be cut into parts
(split-K): each part writes float32 sums of its own, added up in a fixed order afterwards, so that the same call always
gives the same bits.

**Order of the columns.** Codes are loaded as 32-bit words. In the layout of the matrix units a thread owns the columns
2 t, 2 t + 1, 8 + 2 t, 8 + 2 t + 1, .. of a row. A sum does not care for the order of its terms, so column
`8 j + 2 t + b` of the tile stands for code `2 j + b` of word t: whole words fall to one thread, and the input's columns
are loaded in the same order. This halves the instructions a weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels.dispatch import Fused
from finetune.kernels.triton_backend import EXACT, INTERPRETED, on


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
def _product(
    x, y, bias, words, storage, M, O, I: tl.constexpr, BITS: tl.constexpr, HIGH_FIRST: tl.constexpr,  # noqa: E741
    DECODE: tl.constexpr, FORMAT: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
    CHUNKS: tl.constexpr, DOT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of O, parts of I, tiles of M. Where I has several parts, y is float32 [parts, M, O] without bias."""
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
        codes = _codes(words, rows, k0, I, BK, BITS, HIGH_FIRST)
        w = DECODE(codes, storage, rows, k0, I, BK, FORMAT)
        inside = (m[None, :] < M) & (chunk < TOTAL)
        xt = tl.load(x + m[None, :].to(tl.int64) * I + (k0 + order)[:, None], mask=inside, other=0.0)
        w = w.to(xt.dtype)  # rounded as `dequantize` rounds, so that few rows and many see the same weight
        if DOT:
            if UPCAST:
                sums += tl.dot(w.to(tl.float32), xt.to(tl.float32), input_precision="ieee")
            else:
                sums = tl.dot(w, xt, sums)
        else:
            sums += tl.sum(w.to(tl.float32)[:, :, None] * xt.to(tl.float32)[None, :, :], axis=1)
    if bias is not None:
        sums += tl.load(bias + rows).to(tl.float32)[:, None]
    target = y + (part * M + m[None, :]).to(tl.int64) * O + o[:, None]
    tl.store(target, sums.to(y.dtype.element_ty), mask=(m[None, :] < M) & (o[:, None] < O))


def fused_product(
    x_MI: Tensor,
    bias_O: Tensor | None,
    words: Tensor,
    storage: tuple[Tensor, ...],
    out_features: int,
    *,
    bits: int,
    high_first: bool,
    decode: Any,
    settings: tuple[Any, ...],
    plan: Fused,
) -> Tensor:
    """`x_MI @ w_OI.T + bias_O` in the dtype of x.

    Args:
        x_MI: contiguous.
        words: the codes viewed as int32, rows one after another.
        storage: what else `decode` reads: scales, tables.
        bits: of a code, 8, 4 or 2.
        high_first: whether the first of two codes in a byte is in its upper half.
        decode: Triton function `(codes, storage, rows, k0, I, BK, settings) -> float32 [BO, BK]`.
        settings: constants that it is compiled with.
        plan: tile sizes; see kernels/dispatch.py. The tile's width must divide the in features.
    """
    count, in_features = x_MI.shape
    chunks = in_features // plan.block_k
    parts = plan.parts(out_features, in_features)
    each = -(-chunks // parts)
    parts = -(-chunks // each)
    split = parts > 1
    shape = (parts, count, out_features) if split else (count, out_features)
    y = torch.empty(shape, dtype=torch.float32 if split else x_MI.dtype, device=x_MI.device)
    grid = (-(-out_features // plan.block_o), parts, -(-count // plan.block_m))
    with on(x_MI):
        _product[grid](
            x_MI, y, None if split else bias_O, words, storage, count, out_features, in_features, bits, high_first,
            decode, settings, plan.block_m, plan.block_o, plan.block_k, each, plan.kernel == "dot", INTERPRETED,
            num_warps=plan.warps, num_stages=plan.stages, **EXACT,
        )  # fmt: skip
    if not split:
        return y
    total = y.sum(dim=0)
    return (total if bias_O is None else total.add_(bias_O)).to(x_MI.dtype)

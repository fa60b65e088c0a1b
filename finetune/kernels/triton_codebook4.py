"""The 4-bit codebook formats (NF4, FP4) on a GPU: decode, encode, linear and its input gradient, in Triton.

Shape suffixes: M rows, O out features, I in features, N weights (flattened), G blocks, P packed bytes.

Decoding runs at the speed of memory and gives the reference's bits: `table[code] * absmax` in float32, one rounding to
the asked dtype. A linear layer with few rows decodes inside its product (triton_product.py); with many it decodes into
scratch (scratch.py) and leaves the product to the vendor's library, as does the input gradient. Which, says
dispatch.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.kernels import codebook as books
from finetune.kernels import dispatch
from finetune.kernels.products import owned
from finetune.kernels.scratch import gradient_by_scratch, linear_by_scratch
from finetune.kernels.triton_backend import EXACT, flat_bytes, on
from finetune.kernels.triton_product import Format, fused_product

NESTED_BLOCK = tl.constexpr(256)
SEGMENT = 16
"""Bytes of packed codes that surely share an absmax: half the smallest block."""
TILE = 4096
"""Weights that a program of the encoder takes, at least a block."""


@triton.jit
def _scales(absmax, nested, offset, dynamic, index, NESTED: tl.constexpr):
    """Float32 absmax of blocks; double quantization undone where there is one."""
    if NESTED:
        code = tl.load(absmax + index).to(tl.int32)
        scale = tl.load(dynamic + code) * tl.load(nested + index // NESTED_BLOCK) + tl.load(offset)
    else:
        scale = tl.load(absmax + index)
    return scale


@triton.jit
def _dequantize(
    out, packed, absmax, nested, offset, table, dynamic, count, size,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A program decodes STEPS tiles of ROWS segments; a thread's four bytes become sixteen bytes of 16-bit weights.

    `size` is the number of bytes: a mask on it, not on `2 * byte < count`, lets the compiler see whole words.
    """
    start = tl.program_id(0).to(tl.int64) * (STEPS * ROWS * SEGMENT)
    for step in tl.static_range(STEPS):
        row = start + step * ROWS * SEGMENT + tl.arange(0, ROWS).to(tl.int64) * SEGMENT
        byte = row[:, None] + tl.arange(0, SEGMENT)[None, :]
        code = tl.load(packed + byte, mask=byte < size, other=0).to(tl.int32)
        block = tl.minimum(2 * row, count - 1) // BLOCK  # segments beyond the end read the last scale
        scale = _scales(absmax, nested, offset, dynamic, block, NESTED)[:, None]
        pair = tl.join(tl.load(table + (code >> 4)) * scale, tl.load(table + (code & 15)) * scale)
        weight = 2 * row[:, None] + tl.arange(0, 2 * SEGMENT)[None, :]
        values = pair.reshape(ROWS, 2 * SEGMENT).to(out.dtype.element_ty)
        tl.store(out + weight, values, mask=weight < count)


@triton.jit
def _entries(codes, table):
    """Entries of a table of 16. Gathered from shared memory: no address of 64 bits a weight."""
    flat = tl.gather(tl.load(table + tl.arange(0, 16)), codes.reshape(codes.shape[0] * codes.shape[1]), 0)
    return flat.reshape(codes.shape[0], codes.shape[1])


@triton.jit
def _weights(codes, storage, rows, k0, I: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr):  # noqa: E741
    """32 columns surely share an absmax, so there is one for each row and 32 columns."""
    absmax, nested, offset, dynamic, table, _ = storage
    BO: tl.constexpr = rows.shape[0]
    segment = (rows[:, None] * I + k0) // 32 + tl.arange(0, BK // 32)[None, :]
    scale = _scales(absmax, nested, offset, dynamic, segment * 32 // FORMAT[0], FORMAT[1])
    return (_entries(codes, table).reshape(BO, BK // 32, 32) * scale[:, :, None]).reshape(BO, BK)


@triton.jit
def _values(codes, storage, dtype: tl.constexpr, FORMAT: tl.constexpr):
    return _entries(codes, storage[5]).to(dtype)


@triton.jit
def _tile_scales(storage, rows, k0, I: tl.constexpr, FORMAT: tl.constexpr):  # noqa: E741
    absmax, nested, offset, dynamic, _, _ = storage
    scale = _scales(absmax, nested, offset, dynamic, (rows * I + k0) // FORMAT[0], FORMAT[1])
    return scale, scale


@triton.jit
def _quantize(
    weight, packed, absmax, mids, order, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TINY: tl.constexpr
):
    """Encode BLOCKS blocks: the nearest entry of the sorted table, a tie to the lower one."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + index, mask=index < count, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(w), axis=1)
    # The hardware's maximum passes over NaN; callers look for it in the absmax.
    scale = tl.where(tl.max((w != w).to(tl.int32), axis=1) > 0, float("nan"), scale)
    safe = tl.where(scale < TINY, TINY, scale)
    short = (block + 1) * BLOCK > count
    # The reference divides a short last block by its absmax and multiplies whole ones by the reciprocal.
    whole = w * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), safe)[:, None]
    unit = tl.where(short[:, None], tl.div_rn(w, tl.broadcast_to(safe[:, None], (BLOCKS, BLOCK))), whole)
    unit = tl.where(unit > 1.0, 1.0, tl.where(unit < -1.0, -1.0, unit))
    rank = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for entry in tl.static_range(15):
        rank += (unit > tl.load(mids + entry)).to(tl.int32)
    first, second = tl.split(tl.load(order + rank).to(tl.int32).reshape(BLOCKS, BLOCK // 2, 2))
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + byte, ((first << 4) | second).to(tl.uint8), mask=byte < (count + 1) // 2)
    tl.store(absmax + block, tl.where(short, safe, scale), mask=block * BLOCK < count)


def decode_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: str,
    block_size: int,
) -> None:
    """Decode into a contiguous tensor of float32, bfloat16 or float16."""
    count = out.numel()
    if not count:
        return
    rows, steps = 32, 4
    table, dynamic = books.table(codebook, out.device), books.dynamic_map(out.device)
    grid = (-(-count // (2 * steps * rows * SEGMENT)),)
    with on(out):
        _dequantize[grid](
            out, flat_bytes(packed), absmax, *_present(absmax, nested_absmax, offset), table, dynamic, count,
            (count + 1) // 2, block_size, nested_absmax is not None, SEGMENT, rows, steps, num_warps=4, **EXACT,
        )  # fmt: skip


def _present(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments that are always tensors; without double quantization they are not read."""
    if nested_absmax is None or offset is None:
        return absmax, absmax
    return nested_absmax, offset


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """`finetune::dequantize_4bit`."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    decode_into(out, packed, absmax, nested_absmax, offset, codebook, block_size)
    return out


def linear(x_BI: Tensor, bias_O: Tensor | None, *storage_and_width: Any) -> Tensor:
    """`finetune::linear_4bit`: fused for few rows, else by scratch."""
    *storage, out_features = storage_and_width
    in_features = x_BI.shape[-1]
    x_MI = x_BI.reshape(-1, in_features).contiguous()
    plan = dispatch.choose("codebook4", len(x_MI), out_features, in_features, x_MI.dtype, x_MI.device)
    if plan is None or not len(x_MI) or storage[0].data_ptr() % 4:
        return linear_by_scratch(x_BI, bias_O, (out_features, in_features), decode_into, storage)
    return owned(fused(plan, x_MI, bias_O, out_features, *storage).view(*x_BI.shape[:-1], out_features))


def fused(
    plan: dispatch.Fused,
    x_MI: Tensor,
    bias_O: Tensor | None,
    out_features: int,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: str,
    block_size: int,
) -> Tensor:
    """The product with the decoding inside; in features a multiple of 32, the codes on a 4-byte address."""
    device = x_MI.device
    nested = nested_absmax is not None
    form = Format(4, True, _weights, _values, _tile_scales, False, block_size, (block_size, nested))
    scales = (absmax, *_present(absmax, nested_absmax, offset), books.dynamic_map(device))
    tables = (books.table(codebook, device), _rounded_table(codebook, x_MI.dtype, device))
    words = flat_bytes(packed).view(torch.int32)
    return fused_product(form, plan, x_MI, bias_O, words, (*scales, *tables), out_features)


def input_gradient(grad_BO: Tensor, *storage_and_width: Any) -> Tensor:
    """`finetune::input_gradient_4bit`, by scratch: it is asked for in training, where rows are many."""
    *storage, in_features = storage_and_width
    return gradient_by_scratch(grad_BO, (grad_BO.shape[-1], in_features), decode_into, storage)


def quantize(weight: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    """`finetune::quantize_4bit`: codes uint8 [P, 1] and absmax float32 [G], the reference's bits.

    A block with NaN or infinity gets a non-finite absmax.
    """
    flat_N = weight.detach().reshape(-1).contiguous()
    count, device = flat_N.numel(), flat_N.device
    packed_P1 = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)
    absmax_G = torch.empty(-(-count // block_size), dtype=torch.float32, device=device)
    if count:
        blocks = max(1, TILE // block_size)
        mids, order = _decisions(codebook, device)
        with on(flat_N):
            _quantize[(-(-len(absmax_G) // blocks),)](
                flat_N, packed_P1, absmax_G, mids, order, count, block_size, blocks, 1e-38, num_warps=4, **EXACT
            )
    return packed_P1, absmax_G


@cache
def _rounded_table(codebook: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return books.table(codebook, device).to(dtype)


@cache
def _decisions(codebook: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between the sorted entries, float32 [15], and the code of each rank, uint8 [16]."""
    with torch.inference_mode(False):
        values, order = books.table(codebook, torch.device("cpu")).sort(stable=True)
        return books.midpoints(values).to(device), order.to(torch.uint8).to(device)

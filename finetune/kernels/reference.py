"""4-bit codebook quantization in plain torch: the oracle of every other backend, and what runs where there is none.

Shape suffixes: N weights (flattened, row-major), G blocks, P packed bytes = ceil(N / 2).

Bit-exact with bitsandbytes 0.50.2 on CPU (codes, absmax, nested codes, nested absmax, offset). Blocks run over the
*flattened* weight, whatever its width: bitsandbytes' own AVX-512 decoder assumes that a row holds whole blocks and is
wrong where it does not.

A block that holds NaN or infinity gets a non-finite absmax and decodes to non-finite values; with double quantization
the offset, a mean over all blocks, carries this to the whole tensor. Callers that store weights check for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.kernels import codebook as books
from finetune.kernels.pieces import chunk

NESTED_BLOCK = 256
"""Blocks of absmax under one nested absmax (QLoRA, section 3)."""

_TINY = 1e-38
"""Keeps 1 / absmax finite for blocks of zeros; bitsandbytes' figure."""


class Packed4bit(NamedTuple):
    """A weight in 4-bit codes.

    Attributes:
        codes_P1: uint8 [P, 1], two codes a byte, the first in the high nibble; an odd count ends in the code of 0.
        absmax_G: float32 [G], or uint8 [G] codes of the dynamic map where double quantization is on.
        nested_absmax: float32 [ceil(G / 256)] or None.
        offset: float32 [1], the mean of absmax before double quantization, or None.
    """

    codes_P1: Tensor
    absmax_G: Tensor
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None


Encode = Callable[[Tensor, str, int, Tensor, Tensor], None]
"""`encode(flat_N, codebook, block_size, codes_P, absmax_G)`: encodes into the last two, in place."""


def quantize_4bit(
    weight: Tensor, codebook: str, block_size: int, double_quant: bool, encode: Encode | None = None
) -> Packed4bit:
    """Encode a weight of any shape and float dtype, blocks over its row-major flattening.

    `u = clamp(w * (1 / max|w|), -1, 1)`, code = the nearest table entry, a tie to the lower one. The last short block
    divides by its absmax instead, which is what bitsandbytes does.

    Args:
        encode: what encodes a flat weight, with the bits of `encode_4bit`, which is the default.
    """
    encode = encode or encode_4bit
    weight = weight.detach()
    count = weight.numel()
    codes_P1 = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax_G = torch.empty(-(-count // block_size), dtype=torch.float32, device=weight.device)
    # A transposed stack of experts is flattened one expert at a time, so that there is no second copy of the whole.
    whole = weight.is_contiguous() or weight.dim() < 3 or weight[0].numel() % block_size != 0
    start = 0
    for part in [weight] if whole else weight:
        encode(part.reshape(-1), codebook, block_size, codes_P1.view(-1)[start // 2 :], absmax_G[start // block_size :])
        start += part.numel()
    if not double_quant:
        return Packed4bit(codes_P1, absmax_G)
    return Packed4bit(codes_P1, *nest_absmax(absmax_G))


def encode_4bit(flat_N: Tensor, codebook: str, block_size: int, codes_P: Tensor, absmax_G: Tensor) -> None:
    """Encode into `codes_P` and `absmax_G` in place, in pieces, so that no float32 copy of the whole exists."""
    count = flat_N.numel()
    step = chunk(flat_N.device)
    for start in range(0, count, step):
        piece = flat_N[start : start + step].float()
        block = start // block_size
        _encode_piece(piece, codebook, block_size, codes_P[start // 2 :], absmax_G[block:])


def _encode_piece(piece_N: Tensor, codebook: str, block_size: int, codes_P: Tensor, absmax_G: Tensor) -> None:
    whole, rest = divmod(piece_N.numel(), block_size)
    blocks = piece_N[: whole * block_size].view(whole, block_size)
    scale = blocks.abs().amax(dim=1)
    unit = blocks.mul(scale.clamp(min=_TINY).reciprocal().unsqueeze(1)).clamp_(-1, 1).view(-1)
    absmax_G[:whole] = scale
    if rest:
        tail = piece_N[whole * block_size :]
        tail_scale = tail.abs().amax().clamp(min=_TINY)
        absmax_G[whole] = tail_scale
        unit = torch.cat([unit, (tail / tail_scale).clamp_(-1, 1)])
    if unit.numel() % 2:
        unit = torch.nn.functional.pad(unit, (0, 1))
    codes = _nearest(unit, books.decision(codebook, unit.device))
    torch.bitwise_or(codes[::2] << 4, codes[1::2], out=codes_P[: codes.numel() // 2])


def _nearest(unit_N: Tensor, decision: books.Decision) -> Tensor:
    """The code of the table entry nearest to each value, uint8."""
    key = unit_N.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    over = unit_N > decision.threshold.index_select(0, key)
    return torch.where(over, decision.above.index_select(0, key), decision.below.index_select(0, key))


def nest_absmax(absmax_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization (QLoRA, section 3): (uint8 codes [G], nested absmax [ceil(G / 256)], offset [1]).

    The codes come from bitsandbytes' CPU table on every device; its CUDA kernel gives .15 % of them one to the side. A
    group of zeros gets code 0.
    """
    offset = absmax_G.mean()
    centred = absmax_G - offset
    count = centred.numel()
    groups = -(-count // NESTED_BLOCK)
    padded = torch.nn.functional.pad(centred, (0, groups * NESTED_BLOCK - count)).view(groups, NESTED_BLOCK)
    nested = padded.abs().amax(dim=1)
    codes = nested_codes(padded, nested.unsqueeze(1))
    return codes.view(-1)[:count].clone(), nested, offset.reshape(1)


def nested_codes(centred: Tensor, nested: Tensor) -> Tensor:
    """The codes of absmax less the offset under given nested absmax, uint8; beyond them those of the ends."""
    # A group of zeros becomes 0 * infinity = NaN here, and then code 0.
    unit = (centred * nested.reciprocal()).nan_to_num_(nan=-1).clamp_(-1, 1)
    index = ((unit + 1) * 0.5 * 65535 + 0.5).int()
    return books.dynamic_lookup(centred.device)[index]


def decode_absmax(absmax_G: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """Float32 absmax [G], double quantization undone: `map[code] * nested + offset`."""
    if nested_absmax is None:
        return absmax_G
    assert offset is not None
    count = absmax_G.numel()
    values = books.dynamic_map(absmax_G.device).index_select(0, absmax_G.int())
    whole = count // NESTED_BLOCK
    values[: whole * NESTED_BLOCK].view(whole, NESTED_BLOCK).mul_(nested_absmax[:whole].unsqueeze(1))
    values[whole * NESTED_BLOCK :].mul_(nested_absmax[whole:])
    return values.add_(offset)


def dequantize_4bit(packed: Packed4bit, codebook: str, block_size: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Decode to `shape` and `dtype`: `table[code] * absmax` in float32, then cast."""
    device = packed.codes_P1.device
    out = torch.empty(shape, dtype=dtype, device=device)
    out_N = out.view(-1)
    codes_P = packed.codes_P1.reshape(-1)
    absmax_G = decode_absmax(packed.absmax_G, packed.nested_absmax, packed.offset)
    pairs = books.pair_table(codebook, device)
    count = out_N.numel()
    step = min(chunk(device), count + count % 2)
    index = torch.empty(step // 2, dtype=torch.int32, device=device)
    values = torch.empty(step // 2, dtype=torch.float64, device=device)
    for start in range(0, count, step):
        piece = out_N[start : start + step]
        used = (piece.numel() + 1) // 2
        index[:used].copy_(codes_P[start // 2 : start // 2 + used])
        torch.index_select(pairs, 0, index[:used], out=values[:used])
        weights = values[:used].view(torch.float32)[: piece.numel()]
        _scale_blocks(weights, absmax_G[start // block_size :], block_size)
        piece.copy_(weights)
    return out


def _scale_blocks(weights_N: Tensor, absmax_G: Tensor, block_size: int) -> None:
    whole = weights_N.numel() // block_size
    full = whole * block_size
    weights_N[:full].view(whole, block_size).mul_(absmax_G[:whole].unsqueeze(1))
    if full < weights_N.numel():
        weights_N[full:].mul_(absmax_G[whole])

"""llama.cpp's blocks of 32 weights (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0): the reference in plain torch, and the operators.

Shape suffixes: O out features (or any leading dimensions), I in features, G blocks of a row, P bytes of a row,
K weights of a row that are kept aside.

A row is held as ggml holds it (ggml-common.h, `block_q4_0` and its kin), block after block, little endian:

    scale d (float16) | q4_1, q5_1: least m (float16) | q5_*: fifth bits (32 of them, weight j at bit j) | codes

with 16 bytes of codes, weight j in the low and weight j + 16 in the high half of byte j, or for q8_0 32 signed bytes.
Here a code q is always 0 .. 2^bits - 1 and stands for `q * d + m`, or without m for `(q - 2^(bits-1)) * d`, in float32,
each operation rounded on its own.

Of each block some weights can be kept aside (as SpQR does, Dettmers et al. 2023, arXiv:2306.03078, but as many of every
block): their places in the block, uint8, and their values, float16, both [.., O, K]. What their codes say is not looked
at. ggml has no such thing.

ggml knows rows of whole blocks only. Where 32 does not divide a row, its last block here is filled up with code 0,
which no other program reads.

`finetune::dequantize_ggml`, `finetune::linear_ggml` and `finetune::input_gradient_ggml`: see products.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finetune.kernels import cpu_ggml, cpu_stored
from finetune.kernels.operand import register_format
from finetune.kernels.pieces import row_parts
from finetune.kernels.products import autocast, define_products, library

BLOCK = 32
"""Weights of a block."""
_STORAGE = "Tensor blocks, Tensor? places, Tensor? values, str kind"


class Layout(NamedTuple):
    """What a block is made of.

    Attributes:
        bits: of a code.
        least: whether it holds the least of its values, which code 0 stands for.
    """

    bits: int
    least: bool

    @property
    def half(self) -> int:
        """Half the number of codes; the code of zero where there is no least value."""
        return 2 ** (self.bits - 1)

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return 2 + 2 * self.least + 4 * (self.bits == 5) + (BLOCK if self.bits == 8 else BLOCK // 2)


LAYOUTS = {
    "q4_0": Layout(4, False),
    "q4_1": Layout(4, True),
    "q5_0": Layout(5, False),
    "q5_1": Layout(5, True),
    "q8_0": Layout(8, False),
}


def blocks(in_features: int) -> int:
    """Blocks of a row; the last may be filled up."""
    return -(-in_features // BLOCK)


def packed_width(in_features: int, kind: str) -> int:
    """Bytes of a row."""
    return blocks(in_features) * LAYOUTS[kind].size


def pack(codes_OI: Tensor, scale_OG: Tensor, least_OG: Tensor | None, kind: str) -> Tensor:
    """Codes (uint8 [.., O, I]), scales and least values (float16 [.., O, G]) as blocks, uint8 [.., O, P]."""
    bits = LAYOUTS[kind].bits
    short = -codes_OI.shape[-1] % BLOCK
    codes = torch.nn.functional.pad(codes_OI, (0, short)).unflatten(-1, (-1, BLOCK))
    parts = [_bytes(scale_OG)] if least_OG is None else [_bytes(scale_OG), _bytes(least_OG)]
    if bits == 8:
        parts.append(codes ^ 0x80)  # from an excess of 128 to two's complement
    else:
        if bits == 5:
            high = (codes >> 4).unflatten(-1, (-1, 8)) << _shifts(codes.device)
            parts.append(high.sum(dim=-1, dtype=torch.uint8))
        low, high = (codes & 15).chunk(2, dim=-1)
        parts.append(low | high << 4)
    return torch.cat(parts, dim=-1).flatten(-2)


def unpack(blocks_OP: Tensor, kind: str, in_features: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: codes, scales, least values."""
    layout = LAYOUTS[kind]
    held = blocks_OP.unflatten(-1, (-1, layout.size))
    least, at = None, 2
    if layout.least:
        least, at = _halves(held[..., 2:4]), 4
    if layout.bits == 8:
        codes = held[..., at:] ^ 0x80
    else:
        pairs = held[..., -(BLOCK // 2) :]
        codes = torch.cat([pairs & 15, pairs >> 4], dim=-1)
        if layout.bits == 5:
            high = (held[..., at : at + 4].unsqueeze(-1) >> _shifts(held.device)) & 1
            codes |= high.flatten(-2) << 4
    return codes.flatten(-2)[..., :in_features], _halves(held[..., :2]), least


def decode(codes_OI: Tensor, scale_OI: Tensor, least_OI: Tensor | None, kind: str) -> Tensor:
    """The float32 weights of codes, given float16 scales and least values that can be broadcast to them."""
    value = codes_OI.float()
    if least_OI is None:
        return value.sub_(LAYOUTS[kind].half).mul_(scale_OI.float())
    return value.mul_(scale_OI.float()).add_(least_OI.float())


def spread(values_OG: Tensor, first: int, count: int) -> Tensor:
    """A value a block as a value a column, [.., O, C], of `count` columns from `first` on."""
    if first // BLOCK == (first + count - 1) // BLOCK:
        return values_OG[..., first // BLOCK, None].expand(*values_OG.shape[:-1], count)
    return values_OG[..., torch.arange(first, first + count, device=values_OG.device) // BLOCK]


def columns_of(places_OK: Tensor, in_features: int) -> Tensor:
    """The columns of weights that are kept aside, int64 [.., O, K]; of what fills up a block, beyond the row."""
    count = blocks(in_features)
    each = places_OK.shape[-1] // count
    return places_OK + torch.arange(0, count * BLOCK, BLOCK, device=places_OK.device).repeat_interleave(each)


def dequantize_ggml(
    blocks_OP: Tensor,
    places_OK: Tensor | None,
    values_OK: Tensor | None,
    kind: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode to a dense weight of `shape` ([.., O, I]) in float32, then cast to `dtype`. No gradient flows.

    Args:
        blocks_OP: uint8 [.., O, P].
        places_OK, values_OK: uint8 and float16 [.., O, K], of what is kept aside; None for nothing.
        kind: q4_0 | q4_1 | q5_0 | q5_1 | q8_0.
    """
    return torch.ops.finetune.dequantize_ggml(blocks_OP, places_OK, values_OK, kind, shape, dtype)


def linear_ggml(
    x_BI: Tensor,
    bias_O: Tensor | None,
    blocks_OP: Tensor,
    places_OK: Tensor | None,
    values_OK: Tensor | None,
    kind: str,
    out_features: int,
) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` in the dtype of `x_BI`, `w_OI` as `dequantize_ggml` gives it.

    The gradient flows to `x_BI`, and to `bias_O` where it asks for one. Same bits whatever the grad mode. Under
    autocast `x_BI` is cast first.
    """
    x_BI, bias_O = autocast(x_BI, bias_O)
    return torch.ops.finetune.linear_ggml(x_BI, bias_O, blocks_OP, places_OK, values_OK, kind, out_features)


library.define(f"dequantize_ggml({_STORAGE}, SymInt[] shape, ScalarType dtype) -> Tensor")


def reference_dequantize(
    blocks: Tensor, places: Tensor | None, values: Tensor | None, kind: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The operator in plain torch, a few rows at a time."""
    out = torch.empty(shape, dtype=dtype, device=blocks.device)
    width = out.shape[-1]
    out_RI, blocks_RP = out.view(-1, width), blocks.reshape(-1, blocks.shape[-1])
    for part in row_parts(out_RI):
        codes_SI, scale_SG, least_SG = unpack(blocks_RP[part], kind, -(-width // BLOCK) * BLOCK)
        least_SG1 = None if least_SG is None else least_SG.unsqueeze(-1)
        decoded_SI = decode(codes_SI.unflatten(-1, (-1, BLOCK)), scale_SG.unsqueeze(-1), least_SG1, kind).flatten(-2)
        if places is not None and values is not None:
            columns_SK = columns_of(places.reshape(len(out_RI), -1)[part], width)
            decoded_SI.scatter_(1, columns_SK, values.reshape(len(out_RI), -1)[part].float())
        out_RI[part] = decoded_SI[:, :width]
    return out


torch.library.impl("finetune::dequantize_ggml", "default")(reference_dequantize)


@torch.library.register_fake("finetune::dequantize_ggml")
def _dequantize_fake(
    blocks: Tensor, places: Tensor | None, values: Tensor | None, kind: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return blocks.new_empty(shape, dtype=dtype)


_products = define_products("ggml", _STORAGE)


def _as_compiled(
    blocks_OP: Tensor, places_OK: Tensor | None, values_OK: Tensor | None, kind: str, width: int
) -> cpu_ggml.Blocks:
    layout = LAYOUTS[kind]
    return cpu_ggml.blocks(blocks_OP, places_OK, values_OK, (layout.bits, layout.least, layout.size), width)


def _bytes(values_OG: Tensor) -> Tensor:
    """Float16 values as two bytes each, [.., O, G, 2]."""
    return values_OG.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))


def _halves(pairs_OG2: Tensor) -> Tensor:
    """The inverse of `_bytes`."""
    return pairs_OG2.contiguous().view(torch.float16).squeeze(-1)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, device=device, dtype=torch.uint8)


def _operand_linear(
    x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], settings: list[str], out_features: int
) -> Tensor:
    """As `operand.Product`; tensors are blocks and, where weights are kept aside, places and values."""
    storage = [*tensors, None, None][:3]
    return torch.ops.finetune.linear_ggml(x_BI, bias_O, *storage, *settings, out_features)


def _operand_gradient(grad_BO: Tensor, tensors: list[Tensor], settings: list[str], in_features: int) -> Tensor:
    """As `operand.Gradient`."""
    storage = [*tensors, None, None][:3]
    return torch.ops.finetune.input_gradient_ggml(grad_BO, *storage, *settings, in_features)


register_format("ggml", _operand_linear, _operand_gradient)
cpu_stored.serve("ggml", _as_compiled, (reference_dequantize, *_products))

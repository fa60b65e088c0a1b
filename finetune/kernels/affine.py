"""Affine integer codes of 2, 3, 4 or 8 bits in groups along the input: the reference in plain torch, and the operators.

Shape suffixes: O out features (or any leading dimensions), I in features, G groups of a row, P packed bytes of a row.

A code q of 0 .. 2^bits - 1 stands for

- `(q - 2^(bits-1)) * scale` where there is no zero point (symmetric),
- `(q - zero) * scale` where the zero point is an integer (uint8),
- `q * scale + zero` where it is a real number (float32),

in float32, each operation rounded on its own. Groups are `group_size` inputs of one row (-1: the whole row); where that
does not divide the row, its last group is short. Codes lie along the row, least significant bits first: 8, 4 and 2 bits
one after another in bytes, 3 bits as 8 codes in 3 bytes; a row begins on a byte.

`finetune::dequantize_affine`, `finetune::linear_affine` and `finetune::input_gradient_affine`: see products.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels import cpu_integer, cpu_stored, triton_backend
from finetune.kernels.operand import register_format
from finetune.kernels.pieces import row_parts
from finetune.kernels.products import autocast, define_products, library

BITS = (2, 3, 4, 8)

_UNIT = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
"""Codes and bytes of the smallest whole piece of a row."""

_STORAGE = "Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size"


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of a packed row."""
    codes, size = _UNIT[bits]
    return -(-in_features // codes) * size


def groups(in_features: int, group_size: int) -> int:
    """Groups of a row; the last may be short."""
    return 1 if group_size < 0 else -(-in_features // group_size)


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [.., O, I], as bytes [.., O, P]; what fills up the last piece is 0."""
    codes, size = _UNIT[bits]
    if bits == 8:
        return codes_OI.contiguous()
    short = -codes_OI.shape[-1] % codes
    pieces = torch.nn.functional.pad(codes_OI, (0, short)).unflatten(-1, (-1, codes)).int()
    word = (pieces << _shifts(codes, bits, codes_OI.device)).sum(dim=-1, keepdim=True, dtype=torch.int32)
    return ((word >> _shifts(size, 8, codes_OI.device)) & 0xFF).to(torch.uint8).flatten(-2)


def unpack(packed_OP: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of `pack`: uint8 [.., O, I]."""
    codes, size = _UNIT[bits]
    if bits == 8:
        return packed_OP
    pieces = packed_OP.unflatten(-1, (-1, size))
    if size > 1:
        word = (pieces.int() << _shifts(size, 8, packed_OP.device)).sum(dim=-1, keepdim=True, dtype=torch.int32)
    else:
        word = pieces
    shifts = _shifts(codes, bits, packed_OP.device).to(word.dtype)
    return ((word >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :in_features]


def decode(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The float32 weights of unpacked codes."""
    width = codes_OI.shape[-1]
    scale = spread(scale_OG.float(), width, group_size)
    if zero_OG is None:
        return (codes_OI.float() - 2 ** (bits - 1)).mul_(scale)
    zero = spread(zero_OG.float(), width, group_size)
    if zero_OG.is_floating_point():
        return codes_OI.float().mul_(scale).add_(zero)
    return (codes_OI.float() - zero).mul_(scale)


def spread(values_OG: Tensor, in_features: int, group_size: int) -> Tensor:
    """A value a group as a value a column, [.., O, I]."""
    if group_size < 0 or values_OG.shape[-1] == 1:
        return values_OG.expand(*values_OG.shape[:-1], in_features)
    return values_OG.repeat_interleave(group_size, dim=-1)[..., :in_features]


def dequantize_affine(
    codes_OP: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    bits: int,
    group_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode to a dense weight of `shape` ([.., O, I]) in float32, then cast to `dtype`. No gradient flows.

    Args:
        codes_OP: uint8 [.., O, P].
        scale_OG: float16 or float32 [.., O, G].
        zero_OG: None, uint8 or float32 [.., O, G]; its dtype says how it is meant.
        bits: 2, 3, 4 or 8.
        group_size: inputs under one scale; -1 for the whole row.
    """
    return torch.ops.finetune.dequantize_affine(codes_OP, scale_OG, zero_OG, bits, group_size, shape, dtype)


def linear_affine(
    x_BI: Tensor,
    bias_O: Tensor | None,
    codes_OP: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` in the dtype of `x_BI`, `w_OI` as `dequantize_affine` gives it.

    The gradient flows to `x_BI`, and to `bias_O` where it asks for one. Same bits whatever the grad mode. Under
    autocast `x_BI` is cast first.
    """
    x_BI, bias_O = autocast(x_BI, bias_O)
    return torch.ops.finetune.linear_affine(x_BI, bias_O, codes_OP, scale_OG, zero_OG, bits, group_size, out_features)


library.define(f"dequantize_affine({_STORAGE}, SymInt[] shape, ScalarType dtype) -> Tensor")


def reference_dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The operator in plain torch, a few rows at a time."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    width = out.shape[-1]
    out_RI = out.view(-1, width)
    rows = out_RI.shape[0]
    codes_RP, scale_RG = codes.reshape(rows, -1), scale.reshape(rows, -1)
    zero_RG = None if zero is None else zero.reshape(rows, -1)
    for part in row_parts(out_RI):
        codes_SI = unpack(codes_RP[part], bits, width)
        out_RI[part] = decode(codes_SI, scale_RG[part], None if zero_RG is None else zero_RG[part], bits, group_size)
    return out


torch.library.impl("finetune::dequantize_affine", "default")(reference_dequantize)


@torch.library.register_fake("finetune::dequantize_affine")
def _dequantize_fake(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


_products = define_products("affine", _STORAGE)


def _shifts(count: int, bits: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=torch.int32) * bits


def _operand_linear(
    x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], settings: list[str], out_features: int
) -> Tensor:
    """As `operand.Product`; tensors are codes, scale and, where there is one, zero."""
    storage = [*tensors, None][:3]
    return torch.ops.finetune.linear_affine(x_BI, bias_O, *storage, int(settings[0]), int(settings[1]), out_features)


def _operand_gradient(grad_BO: Tensor, tensors: list[Tensor], settings: list[str], in_features: int) -> Tensor:
    """As `operand.Gradient`."""
    storage = [*tensors, None][:3]
    return torch.ops.finetune.input_gradient_affine(grad_BO, *storage, int(settings[0]), int(settings[1]), in_features)


register_format("affine", _operand_linear, _operand_gradient)
cpu_stored.serve("affine", cpu_integer.affine, (reference_dequantize, *_products))
for _operator in ("dequantize", "linear", "input_gradient"):
    triton_backend.register(f"{_operator}_affine", "triton_affine", _operator)

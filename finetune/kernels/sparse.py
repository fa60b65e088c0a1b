"""Weights of which only what is not zero is kept, and where it was: the reference in plain torch, and the operators.

Shape suffixes: O out features (or any leading dimensions), I in features, G groups of a row, K kept values of a group,
P bytes of a row, N kept values.

Nothing is rounded. Two layouts:

- a bitmask, `group` 0: `places` is uint8 [.., O, ceil(I / 8)], weight i of a row at bit i % 8 of byte i // 8, and
  `values` is [N], row after row. One bit a weight and a value for each that is not zero.
- groups: of every `group` inputs in a row `kept` values, `values` [.., O, G * K], and for each its place in the group,
  in ascending order: 2, 3 or 4 bits for groups of 4, 8 or 16, packed as in kernels/affine.py, `places` [.., O, P]. A
  group with fewer that are not zero keeps zeros. For 2:4 these bytes are the metadata of NVIDIA's sparse matrix units
  (Mishra et al. 2021, arXiv:2104.08378, section 2), before CUTLASS puts it in the order that these read.

`finetune::dequantize_sparse`, `finetune::linear_sparse` and `finetune::input_gradient_sparse`: see products.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels import affine, cpu_sparse, cpu_stored
from finetune.kernels.operand import register_format
from finetune.kernels.pieces import row_parts
from finetune.kernels.products import autocast, define_products, library

PLACE_BITS = {4: 2, 8: 3, 16: 4}
"""Bits of a place, by the size of a group."""
_STORAGE = "Tensor places, Tensor values, int kept, int group"


def mask_width(in_features: int) -> int:
    """Bytes of a row's bitmask."""
    return -(-in_features // 8)


def pack_mask(mask_OI: Tensor) -> Tensor:
    """bool [.., O, I] as bits, uint8 [.., O, P]; what fills up the last byte is 0."""
    short = -mask_OI.shape[-1] % 8
    bits = torch.nn.functional.pad(mask_OI, (0, short)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits << _shifts(mask_OI.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_mask(places_OP: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_mask`."""
    bits = (places_OP.unsqueeze(-1) >> _shifts(places_OP.device)) & 1
    return bits.flatten(-2)[..., :in_features].bool()


def most_kept(mask_OI: Tensor, group: int) -> int:
    """The most that any group of so many inputs keeps; 0 where all are empty."""
    counts = mask_OI.unflatten(-1, (-1, group)).sum(dim=-1)
    return int(counts.max()) if counts.numel() else 0


def compress_groups(w_OI: Tensor, kept: int, group: int) -> tuple[Tensor, Tensor]:
    """Places and values of a weight whose groups hold at most `kept` that are not zero."""
    grouped = w_OI.unflatten(-1, (-1, group))
    order = torch.arange(group, device=w_OI.device, dtype=torch.int16)
    # What is not zero comes first; then as many zeros as it takes. Places end up in ascending order.
    chosen = torch.where(grouped != 0, order, order + group).topk(kept, dim=-1, largest=False).values % group
    places = chosen.long().sort(dim=-1).values
    codes = places.flatten(-2).to(torch.uint8)
    return affine.pack(codes, PLACE_BITS[group]), grouped.gather(-1, places).flatten(-2)


def dequantize_sparse(
    places: Tensor, values: Tensor, kept: int, group: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The dense weight of `shape` ([.., O, I]), cast to `dtype`. No gradient flows.

    Args:
        places, values: as at the top; values in any floating dtype.
        kept, group: K and the size of a group; 0 and 0 for a bitmask.
    """
    return torch.ops.finetune.dequantize_sparse(places, values, kept, group, shape, dtype)


def linear_sparse(
    x_BI: Tensor, bias_O: Tensor | None, places: Tensor, values: Tensor, kept: int, group: int, out_features: int
) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` in the dtype of `x_BI`, `w_OI` as `dequantize_sparse` gives it.

    The gradient flows to `x_BI`, and to `bias_O` where it asks for one. Same bits whatever the grad mode. Under
    autocast `x_BI` is cast first.
    """
    x_BI, bias_O = autocast(x_BI, bias_O)
    return torch.ops.finetune.linear_sparse(x_BI, bias_O, places, values, kept, group, out_features)


library.define(f"dequantize_sparse({_STORAGE}, SymInt[] shape, ScalarType dtype) -> Tensor")


def reference_dequantize(
    places: Tensor, values: Tensor, kept: int, group: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The operator in plain torch, a few rows at a time."""
    out = torch.zeros(shape, dtype=dtype, device=places.device)
    width = out.shape[-1]
    out_RI, places_RP = out.view(-1, width), places.reshape(-1, places.shape[-1])
    used = 0
    for part in row_parts(out_RI):
        if group:
            places_SV = affine.unpack(places_RP[part], PLACE_BITS[group], width // group * kept).long()
            values_SV = values.reshape(len(out_RI), -1)[part].to(dtype)
            out_RI[part].unflatten(-1, (-1, group)).scatter_(
                -1, places_SV.unflatten(-1, (-1, kept)), values_SV.unflatten(-1, (-1, kept))
            )
        else:
            mask_SI = unpack_mask(places_RP[part], width)
            count = int(mask_SI.sum())
            out_RI[part].masked_scatter_(mask_SI, values[used : used + count].to(dtype))
            used += count
    return out


torch.library.impl("finetune::dequantize_sparse", "default")(reference_dequantize)


@torch.library.register_fake("finetune::dequantize_sparse")
def _dequantize_fake(
    places: Tensor, values: Tensor, kept: int, group: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return places.new_empty(shape, dtype=dtype)


_products = define_products("sparse", _STORAGE)


def _as_compiled(places: Tensor, values: Tensor, kept: int, group: int, width: int) -> cpu_sparse.Sparse:
    return cpu_sparse.sparse(places, values, kept, group, PLACE_BITS.get(group, 0), width)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, device=device, dtype=torch.uint8)


def _operand_linear(
    x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], settings: list[str], out_features: int
) -> Tensor:
    """As `operand.Product`; tensors are places and values."""
    return torch.ops.finetune.linear_sparse(x_BI, bias_O, *tensors, *map(int, settings), out_features)


def _operand_gradient(grad_BO: Tensor, tensors: list[Tensor], settings: list[str], in_features: int) -> Tensor:
    """As `operand.Gradient`."""
    return torch.ops.finetune.input_gradient_sparse(grad_BO, *tensors, *map(int, settings), in_features)


register_format("sparse", _operand_linear, _operand_gradient)
cpu_stored.serve("sparse", _as_compiled, (reference_dequantize, *_products))

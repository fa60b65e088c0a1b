"""Public layouts of integer weights as the state that our affine modules take.

Shape suffixes: O out features, I in features, G groups of a row, P packed bytes of a row, R rows of words, W words.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ConfigError, ModelError
from finetune.kernels import affine
from finetune.quant.affine_ordered import ORDER
from finetune.quant.affine_storage import BITS, FACTS, FORMAT_VERSION, AffineConfig
from finetune.quant.base import QUANTIZERS
from finetune.quant.facts import pack_json
from finetune.quant.packed import CHUNK

FLOATING = (torch.float16, torch.bfloat16, torch.float32)
"""dtypes that scales come in."""


def affine_config(bits: int, group_size: int, symmetric: bool, where: str) -> AffineConfig:
    """The settings of weights in integers as one of our configurations.

    Args:
        group_size: inputs under one scale; -1 for all of a row.
        where: prefix for messages.

    Raises:
        ModelError: for widths and groups that we have not.
    """
    name = next((name for name, count in BITS.items() if count == bits), None)
    if name is None:
        raise ModelError(f"{where} is stored in {bits} bits: expected {', '.join(map(str, sorted(BITS.values())))}")
    kind: Any = QUANTIZERS.type_of(name)
    try:
        return kind(group_size=group_size, symmetric=symmetric, zero_point="integer")
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error


def number(told: dict[str, Any], key: str, where: str) -> int:
    """A whole number that a checkpoint's configuration holds.

    Raises:
        ModelError: where it holds none.
    """
    value = told.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"{where}: {key} of its quantization is {value!r}: expected a whole number")
    return value


def complete(stored: dict[str, Tensor], keys: Iterable[str], path: str) -> None:
    """Refuse a weight without one of its companions.

    Raises:
        ModelError: naming it.
    """
    for key in keys:
        if key not in stored:
            raise ModelError(f"{path}{key} is missing from the checkpoint")


def affine_state(
    codes_OP: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    quant: AffineConfig,
    in_features: int,
    dtype: torch.dtype,
    order_I: Tensor | None = None,
) -> dict[str, Tensor]:
    """What `Affine.take_state` takes, or with an order `OrderedAffineLinear.take_state`.

    Args:
        codes_OP: uint8, packed as in kernels/affine.py, perhaps with more bytes a row than needed.
        scale_OG: in any floating dtype.
        zero_OG: integers, or None where there are none.
        dtype: that the weight stands for.
        order_I: of `column_order`; the codes are put into it here.
    """
    facts = {
        "format_version": FORMAT_VERSION,
        "bits": quant.bits,
        "group_size": quant.group_size,
        "zero_point": "none" if zero_OG is None else "integer",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [len(codes_OP), in_features],
    }
    codes_OP = codes_OP[:, : affine.packed_width(in_features, quant.bits)].contiguous()
    state = {
        "weight": codes_OP if order_I is None else permuted(codes_OP, order_I, quant.bits),
        "weight.scale": _exact(scale_OG).contiguous(),
        FACTS: pack_json(facts),
    }
    if zero_OG is not None:
        state["weight.zero"] = zero_OG.to(torch.uint8).contiguous()
    if order_I is not None:
        state[ORDER] = order_I
    return state


def column_order(group_I: Tensor, group_size: int, where: str) -> Tensor | None:
    """The order in which columns lie group by group, int32 [I]; None where they do so already.

    Args:
        group_I: the group of each column.
        where: its name, for messages.

    Raises:
        ModelError: where the groups are not `group_size` columns each (the last perhaps fewer).
    """
    width = len(group_I)
    runs_I = torch.arange(width, device=group_I.device) // (width if group_size < 0 else group_size)
    if torch.equal(group_I.long(), runs_I):
        return None
    order_I = group_I.argsort(stable=True)
    if not torch.equal(group_I[order_I].long(), runs_I):
        size = width if group_size < 0 else group_size
        raise ModelError(
            f"{where} puts its {width} inputs into groups that are not of {size} each: expected equal groups"
        )
    return order_I.to(torch.int32)


def permuted(codes_OP: Tensor, order_I: Tensor, bits: int) -> Tensor:
    """Packed codes with their columns in another order."""
    rows = max(1, CHUNK // len(order_I))
    order_I = order_I.to(codes_OP.device)
    return torch.cat(
        [affine.pack(affine.unpack(part, bits, len(order_I))[:, order_I], bits) for part in codes_OP.split(rows)]
    )


def as_bytes(words_RW: Tensor) -> Tensor:
    """Rows of int32 as rows of bytes, the least significant first."""
    return words_RW.contiguous().view(torch.uint8)


def _exact(scale_OG: Tensor) -> Tensor:
    """Scales in float16 where that holds them exactly, else in float32."""
    half = scale_OG.to(torch.float16)
    return half if torch.equal(half.float(), scale_OG.float()) else scale_OG.float()

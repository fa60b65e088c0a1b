"""compressed-tensors' `pack-quantized` layout: affine integers of linear layers, for vLLM and stock transformers.

In place of `weight` (compressed-tensors 0.20, compressors/pack_quantized): `weight_packed` (int32 [O, ceil(I * bits /
32)], codes along the input, least significant bits first), `weight_scale` ([O, G] in a floating dtype), `weight_shape`
(int64 [2]), and where there are zero points `weight_zero_point` (int32 [ceil(O * bits / 32), G], packed along the
output); with groups in act-order `weight_g_idx` ([I], the group of each input). Codes and zero points are signed there
and packed with 2^(bits-1) added, which are our own unsigned ones.

Shape suffixes: O out features, I in features, G groups of a row, P packed bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.kernels import affine
from finetune.model.integer_state import affine_config, affine_state, as_bytes, column_order, complete
from finetune.model.stored_format import Held, StoredFormat
from finetune.quant.affine import AffineLinear
from finetune.quant.affine_storage import AffineConfig
from finetune.quant.base import QuantConfig

METHOD = "compressed-tensors"
PACKED_BITS = (4, 8)
"""Widths that every version of the package packs alike."""
WORD = 4
"""Bytes of an int32."""


class CompressedTensors(StoredFormat):
    """`pack-quantized` weights of 4 or 8 bits; only read: a model saved as it is in memory has our own keys."""

    mark = "weight_packed"
    methods = (METHOD,)
    packs_experts_singly = True
    companions = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def settings(self, told: dict[str, Any], held: Held, where: str) -> QuantConfig:
        found = one_scheme(told, lambda group: _config(group.get("weights") or {}, where), where)
        if any(group.get("input_activations") for group in told["config_groups"].values()):
            raise ModelError(f"{where} rounds its activations too, which is not read here: expected weights only")
        return found

    def state(self, stored: dict[str, Tensor], name: str, quant: QuantConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(quant, AffineConfig)
        path = name.removesuffix("weight")
        zeros = ["weight_zero_point"] if quant.zeros != "none" else []
        complete(stored, ("weight_packed", "weight_scale", "weight_shape", *zeros), path)
        rows, width = (int(size) for size in stored["weight_shape"].tolist())
        zero_OG = None
        if zeros:
            packed_GP = as_bytes(stored["weight_zero_point"].T)
            zero_OG = affine.unpack(packed_GP, quant.bits, rows).T
        codes_OP, group_I = as_bytes(stored["weight_packed"]), stored.get("weight_g_idx")
        order_I = None
        if group_I is not None and bool((group_I >= 0).all()):  # -1 where no column was moved
            order_I = column_order(group_I, quant.group_size, f"{path}weight_g_idx")
        return affine_state(codes_OP, stored["weight_scale"], zero_OG, quant, width, dtype, order_I)


def one_scheme(told: dict[str, Any], read: Callable[[dict[str, Any]], QuantConfig], where: str) -> QuantConfig:
    """The settings that all groups of a `quantization_config` come to.

    Args:
        read: the settings of a group.
        where: prefix for messages.

    Raises:
        ModelError: where there are none, or several.
    """
    found = [read(group) for group in (told.get("config_groups") or {}).values()]
    if not found or any(config != found[0] for config in found):
        raise ModelError(f"{where}: config.json has {len(found)} schemes of weights, expected one for all layers")
    return found[0]


def all_linears(layout: str, schemes: dict[str, Any], kept: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json where every linear layer is stored alike.

    Args:
        schemes: of the weights, and perhaps of the inputs.
        kept: names of the linear modules that are not quantized.
    """
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **schemes}},
        "ignore": sorted(kept),
    }


def holds(quant: QuantConfig) -> bool:
    """Whether the layout has a place for a format at all; `fits` says so of a width."""
    return isinstance(quant, AffineConfig) and quant.bits in PACKED_BITS and quant.zeros in ("none", "integer")


def fits(quant: QuantConfig, in_features: int) -> bool:
    """Whether the groups of a row are all of one size, which this layout wants."""
    assert isinstance(quant, AffineConfig)
    return quant.group_size < 0 or in_features % quant.group_size == 0


def compressed_state(linear: AffineLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module under compressed-tensors' keys, without the bias.

    Args:
        dtype: of the scales; one that they survive (`Affine.scale_dtype`).
    """
    stored = linear.packed()
    state = {
        "weight_packed": _words(stored.codes_OP),
        "weight_scale": stored.scale_OG.detach().to(dtype),
        "weight_shape": torch.tensor(linear.shape),
    }
    if stored.zero_OG is not None:
        state["weight_zero_point"] = _words(affine.pack(stored.zero_OG.T, linear.bits)).T.contiguous()
    return state


def stock_config(quant: QuantConfig, kept: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        kept: names of the linear modules that are not quantized.
    """
    assert isinstance(quant, AffineConfig)
    row = quant.group_size < 0
    weights = {
        "num_bits": quant.bits,
        "type": "int",
        "symmetric": quant.symmetric,
        "strategy": "channel" if row else "group",
        "group_size": None if row else quant.group_size,
        "dynamic": False,
    }
    told = all_linears("pack-quantized", {"weights": weights}, kept)
    # compressed-tensors 0.20 makes room for unpacked zero points and then refuses packed ones, unless transformers
    # decodes weights while it loads them.
    return told if quant.symmetric else told | {"dequantize": True}


def _config(scheme: dict[str, Any], where: str) -> AffineConfig:
    """A scheme of weights as one of our configurations."""
    bits, strategy = scheme.get("num_bits"), scheme.get("strategy")
    if bits not in PACKED_BITS or scheme.get("type") != "int" or strategy not in ("group", "channel"):
        raise ModelError(
            f"{where} is packed as {bits} bits {scheme.get('type')} by {strategy}, which is not read here: expected int"
            " of 4 or 8 bits by group or channel"
        )
    size = int(scheme["group_size"]) if strategy == "group" else -1
    return affine_config(bits, size, bool(scheme.get("symmetric", True)), where)


def _words(bytes_RP: Tensor) -> Tensor:
    """Rows of bytes as rows of int32, filled up with 0."""
    short = -bytes_RP.shape[-1] % WORD
    return torch.nn.functional.pad(bytes_RP.detach(), (0, short)).contiguous().view(torch.int32)

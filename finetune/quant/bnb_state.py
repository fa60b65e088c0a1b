"""4-bit modules in bitsandbytes' serialization, both ways, bit for bit.

Keys, relative to a module: `weight` (uint8 [P, 1]), `weight.absmax`, `weight.quant_map`, with double quantization
`weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4` (or `__fp4`), which is
JSON in a uint8 tensor. That is the layout of `bitsandbytes.functional.QuantState.as_dict(packed=True)`, version 0.50.2,
which transformers reads. Nothing is pickled.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.kernels import codebook as books
from finetune.kernels.reference import NESTED_BLOCK, Packed4bit
from finetune.quant.facts import FLOATS, facts_in, pack_json, same_shape

if TYPE_CHECKING:
    from finetune.quant.codebook4_storage import Codebook4

_STATE = "weight.quant_state.bitsandbytes__"


def bnb_state(module: Codebook4) -> dict[str, Tensor]:
    """The tensors of a 4-bit module under bitsandbytes' keys, without the bias; the stored ones shared, not copied."""
    packed = module.packed()
    device = packed.codes_P1.device
    facts: dict[str, Any] = {
        "quant_type": module.codebook,
        "blocksize": module.block_size,
        "dtype": str(module.dtype).removeprefix("torch."),
        "shape": list(module.shape),
    }
    state = {
        "weight": packed.codes_P1.detach(),
        "weight.absmax": packed.absmax_G.detach(),
        "weight.quant_map": books.table(module.codebook, device).clone(),
    }
    if packed.nested_absmax is not None:
        assert packed.offset is not None
        state["weight.nested_absmax"] = packed.nested_absmax.detach()
        state["weight.nested_quant_map"] = books.dynamic_map(device).clone()
        facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": packed.offset.item()}
    state[_STATE + module.codebook] = pack_json(facts)
    return state


def from_bnb_state(module: Codebook4, state: dict[str, Tensor], name: str = "") -> None:
    """Fill a 4-bit module from tensors under bitsandbytes' keys, and take over the settings they say.

    `weight` may be a view of the packed bytes in any dtype (`bnb_4bit_quant_storage`). The module keeps its device, or
    takes that of the tensors where it is on meta.

    Args:
        name: prefix for messages, e.g. "model.layers.0.self_attn.q_proj.".

    Raises:
        ModelError: when a key is missing or a tensor does not fit the module, naming the key.
    """
    facts = _facts(state, name)
    same_shape(facts["shape"], module.shape, name)
    device = state["weight"].device if module.weight.is_meta else module.weight.device
    block_size, nested = int(facts["blocksize"]), "weight.nested_absmax" in state
    count = prod(module.shape)
    blocks = -(-count // block_size)

    def tensor(key: str, size: int, dtype: torch.dtype) -> Tensor:
        if key not in state:
            raise ModelError(f"{name}{key} is missing from the checkpoint")
        value = state[key].detach().to(device).contiguous().view(-1)
        if key == "weight":
            value = value.view(torch.uint8)
        elif dtype.is_floating_point and value.is_floating_point():
            value = value.to(dtype)
        if value.numel() != size or value.dtype != dtype:
            raise ModelError(f"{name}{key} has {value.numel()} x {value.dtype}, expected {size} x {dtype}")
        return value

    key = "weight.quant_map"
    _check_map(tensor(key, 16, torch.float32), books.table(facts["quant_type"], device), name + key)
    codes_P1 = tensor("weight", (count + 1) // 2, torch.uint8).view(-1, 1)
    absmax_G = tensor("weight.absmax", blocks, torch.uint8 if nested else torch.float32)
    packed = Packed4bit(codes_P1, absmax_G)
    if nested:
        if facts.get("nested_blocksize") != NESTED_BLOCK:
            found = facts.get("nested_blocksize")
            raise ModelError(f"{name}weight: nested_blocksize is {found}, expected {NESTED_BLOCK}")
        key = "weight.nested_quant_map"
        _check_map(tensor(key, 256, torch.float32), books.dynamic_map(device), name + key)
        nested_absmax = tensor("weight.nested_absmax", -(-blocks // NESTED_BLOCK), torch.float32)
        offset = torch.tensor([float(facts["nested_offset"])], device=device)
        packed = Packed4bit(codes_P1, absmax_G, nested_absmax, offset)
    module.codebook, module.block_size, module.double_quant = facts["quant_type"], block_size, nested
    module.dtype = FLOATS[facts["dtype"]]
    module.hold(packed)


def _facts(state: dict[str, Tensor], name: str) -> dict[str, Any]:
    """The settings that a checkpoint's JSON tensor holds, checked."""
    keys = [key for key in state if key.startswith(_STATE)]
    if "weight" not in state or len(keys) != 1:
        raise ModelError(f"{name}weight: expected codes and one {_STATE}nf4 or fp4, the checkpoint has {sorted(state)}")
    where = name + keys[0]
    facts = facts_in(state[keys[0]], ("quant_type", "blocksize", "dtype", "shape"), where)
    size = facts["blocksize"]
    if facts["quant_type"] not in books.CODEBOOKS or facts["dtype"] not in FLOATS:
        raise ModelError(f"{where}: quant_type {facts['quant_type']!r} of {facts['dtype']!r} is not one we can read")
    if not isinstance(size, int) or not 32 <= size <= 4096 or size & (size - 1):
        raise ModelError(f"{where}: blocksize is {size!r}, expected a power of two from 32 to 4096")
    return facts


def _check_map(found: Tensor, ours: Tensor, where: str) -> None:
    """The tables are constants: a checkpoint with others would decode to other weights here."""
    if not torch.allclose(found, ours, rtol=0, atol=1e-6):
        raise ModelError(f"{where} is not the standard table (off by {(found - ours).abs().max().item():.3g})")

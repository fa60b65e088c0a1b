"""What a 4-bit bitsandbytes checkpoint says of itself, and how to say the same of ours.

Such a checkpoint names `quant_method: bitsandbytes` in config.json; every packed weight carries its own settings as
JSON in a uint8 tensor `<name>.quant_state.bitsandbytes__<type>` (bitsandbytes/functional.py,
`QuantState.as_dict(packed=True)`). `<type>` is the name under which the storage format is registered with us: nf4, fp4.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.model.headers import Header
from finetune.quant.base import QUANTIZERS, QuantConfig

STATE = "quant_state.bitsandbytes__"
COMPANIONS = [
    "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax",
    f"weight.{STATE}nf4", f"weight.{STATE}fp4",
]  # fmt: skip
"""Names beside `weight` in a module's state, none of them the start of another that comes later."""

STORAGE = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""dtypes that bitsandbytes can disguise packed bytes as (`bnb_4bit_quant_storage`), by their names in safetensors."""


def stored_settings(
    config: dict[str, Any], headers: list[Header], where: str
) -> tuple[QuantConfig | None, dict[str, torch.dtype]]:
    """How a checkpoint is stored already, by its config.json and the headers of its shards.

    Returns:
        Its settings as ours, None for a dense checkpoint; and the dtype that the packed bytes are disguised as, by name
        of the weight.

    Raises:
        ModelError: for a storage that we do not read.
    """
    told = config.get("quantization_config")
    tensors = {tensor.name: (header, tensor) for header in headers for tensor in header.tensors}
    states = [name for name in tensors if STATE in name]
    if told is None and not states:
        return None, {}
    method = (told or {}).get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or (told or {}).get("load_in_8bit"):
        shown = "bitsandbytes int8" if method == "bitsandbytes" else method
        raise ModelError(
            f"{where} is stored as {shown}, which cannot be a base here: expected dense weights or 4-bit bitsandbytes"
        )
    if not states:
        raise ModelError(
            f"{where}: config.json says bitsandbytes 4-bit, but no shard holds a {STATE}* tensor: save it again"
        )
    header, tensor = tensors[states[0]]
    settings = _settings(_state(header.read(tensor), states[0]), states[0])
    weights = {name.partition(f".{STATE}")[0] for name in states}
    return settings, {name: STORAGE.get(tensors[name][1].dtype, torch.uint8) for name in weights if name in tensors}


def settings_of(stored: dict[str, Tensor], name: str) -> QuantConfig:
    """The settings of one packed weight, from its companions.

    Raises:
        ModelError: where they do not say.
    """
    key = next((key for key in stored if STATE in key), None)
    if key is None:
        raise ModelError(
            f"{name} is packed in the checkpoint but lacks its {STATE}* tensor; there are {', '.join(stored)}"
        )
    return _settings(_state(bytes(stored[key].cpu().numpy()), name), name)


def quantization_config(quant: QuantConfig, dtype: torch.dtype, kept: list[str]) -> dict[str, Any] | None:
    """`quantization_config` of config.json for a model stored so; None where stock transformers has no such thing.

    Args:
        quant: the storage format.
        dtype: that stock modules compute in.
        kept: names of the linear modules that are not quantized.
    """
    if f"weight.{STATE}{quant.name}" not in COMPANIONS:
        return None
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.name,
        bnb_4bit_use_double_quant=bool(getattr(quant, "double_quant", False)),
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(kept),
    )
    return json.loads(config.to_json_string(use_diff=False))


def agree(asked: QuantConfig, stored: QuantConfig, where: str) -> None:
    """Refuse settings that a checkpoint stored otherwise cannot honour. Whether its head is packed shows later.

    Raises:
        ModelError: naming both.
    """
    wanted, has = asdict(asked), asdict(stored)
    for key in sorted((wanted.keys() | has.keys()) - {"head"}, key=lambda key: (key != "name", key)):
        if wanted.get(key) != has.get(key):
            name = "quant" if key == "name" else f"quant.{key}"
            raise ModelError(
                f"{name}={wanted.get(key)} conflicts with {where}, which is stored with {name}={has.get(key)}: "
                "use quant=keep, or a dense checkpoint"
            )


def _state(raw: bytes, name: str) -> dict[str, Any]:
    """The JSON in a quant_state tensor."""
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ModelError(f"{name} is corrupt: expected JSON ({error})") from error


def _settings(state: dict[str, Any], name: str) -> QuantConfig:
    """A quant_state as one of our configurations."""
    try:
        kind = QUANTIZERS.type_of(state["quant_type"])
        nested = "nested_blocksize" in state or "nested_offset" in state
        return kind(block_size=int(state["blocksize"]), double_quant=nested)  # type: ignore[call-arg]
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{name} is corrupt: expected quant_type, blocksize and shape, found {', '.join(state)}"
        ) from error

"""What a 4-bit bitsandbytes checkpoint says of itself, and how to say the same of ours.

Every packed weight carries its own settings as JSON in a uint8 tensor `<name>.quant_state.bitsandbytes__<type>`
(bitsandbytes/functional.py, `QuantState.as_dict(packed=True)`). `<type>` is the name under which the storage format is
registered with us: nf4, fp4.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.model.headers import StoredTensor
from finetune.model.stored_format import Held, StoredFormat
from finetune.quant.base import QUANTIZERS, QuantConfig

STATE = "quant_state.bitsandbytes__"

STORAGE = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""dtypes that bitsandbytes can disguise packed bytes as (`bnb_4bit_quant_storage`), by their names in safetensors."""


class Bnb4bit(StoredFormat):
    """NF4 and FP4."""

    mark = f"weight.{STATE}"
    methods = ("bitsandbytes", "finetune")
    derived = False
    companions = (
        "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax",
        f"weight.{STATE}nf4", f"weight.{STATE}fp4",
    )  # fmt: skip

    def disguise(self, weight: StoredTensor) -> torch.dtype:
        return STORAGE.get(weight.dtype, torch.uint8)

    def settings(self, told: dict[str, Any], held: Held, where: str) -> QuantConfig:
        name = self.marks(held)[0]
        header, tensor = held[name]
        return _settings(_state(header.read(tensor), name), name)

    def settings_of(self, stored: dict[str, Tensor], name: str, quant: QuantConfig) -> QuantConfig:
        key = next((key for key in stored if STATE in key), None)
        if key is None:
            raise ModelError(
                f"{name} is packed in the checkpoint but lacks its {STATE}* tensor; there are {', '.join(stored)}"
            )
        return _settings(_state(bytes(stored[key].cpu().numpy()), name), name)

    def writes(self, quant: QuantConfig) -> bool:
        return f"weight.{STATE}{quant.name}" in self.companions

    def stock_config(self, quant: QuantConfig, dtype: torch.dtype, kept: list[str]) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.name,
            bnb_4bit_use_double_quant=bool(getattr(quant, "double_quant", False)),
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=sorted(kept),
        )
        return json.loads(config.to_json_string(use_diff=False))


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

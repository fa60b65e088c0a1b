"""Checkpoints in our own affine integer codes (quant/affine_storage.py): no stock library reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.model.stored_format import Held, StoredFormat
from finetune.quant.affine_ordered import ORDER
from finetune.quant.affine_storage import FACTS, AffineConfig, name_of, read_facts
from finetune.quant.base import QUANTIZERS, QuantConfig


class AffineCodes(StoredFormat):
    """int8g, int4, int3 and int2."""

    mark = FACTS
    methods = ("finetune",)
    companions = (FACTS, "weight.scale", "weight.zero", ORDER)

    def settings(self, told: dict[str, Any], held: Held, where: str) -> QuantConfig:
        name = self.marks(held)[0]
        header, tensor = held[name]
        raw = torch.frombuffer(bytearray(header.read(tensor)), dtype=torch.uint8)
        return _settings({FACTS: raw, "weight": raw}, name.removesuffix(FACTS))

    def settings_of(self, stored: dict[str, Tensor], name: str, quant: QuantConfig) -> QuantConfig:
        return _settings(stored, name.removesuffix("weight"))

    def writes(self, quant: QuantConfig) -> bool:
        return isinstance(quant, AffineConfig)


def _settings(stored: dict[str, Tensor], name: str) -> QuantConfig:
    """The settings that a weight carries as one of our configurations."""
    facts = read_facts(stored, name)
    kind: Any = QUANTIZERS.type_of(name_of(facts))
    zero = facts["zero_point"]
    symmetric = zero == "none"
    return kind(group_size=facts["group_size"], symmetric=symmetric, zero_point="integer" if symmetric else zero)

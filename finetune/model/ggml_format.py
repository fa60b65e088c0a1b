"""Checkpoints in llama.cpp's blocks under our own keys (quant/ggml_storage.py): no stock library reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.model.stored_format import Held, StoredFormat
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.ggml_storage import FACTS, GgmlConfig, read_facts


class GgmlBlocks(StoredFormat):
    """q4_0, q4_1, q5_0, q5_1 and q8_0."""

    mark = FACTS
    methods = ("finetune",)
    companions = (FACTS, "weight.places", "weight.values")

    def settings(self, told: dict[str, Any], held: Held, where: str) -> QuantConfig:
        name = self.marks(held)[0]
        header, tensor = held[name]
        raw = torch.frombuffer(bytearray(header.read(tensor)), dtype=torch.uint8)
        return _settings({FACTS: raw, "weight": raw}, name.removesuffix(FACTS))

    def settings_of(self, stored: dict[str, Tensor], name: str, quant: QuantConfig) -> QuantConfig:
        return _settings(stored, name.removesuffix("weight"))

    def writes(self, quant: QuantConfig) -> bool:
        return isinstance(quant, GgmlConfig)


def _settings(stored: dict[str, Tensor], name: str) -> QuantConfig:
    """The settings that a weight carries as one of our configurations."""
    facts = read_facts(stored, name)
    kind: Any = QUANTIZERS.type_of(facts["type"])
    return kind(outliers=facts.get("outliers", 0))

"""Checkpoints in llama.cpp's blocks under our own keys (quant/ggml_storage.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from finetune.model.facts_format import FactsFormat
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.ggml_storage import FACTS, GgmlConfig, read_facts


class GgmlBlocks(FactsFormat):
    """q4_0, q4_1, q5_0, q5_1 and q8_0."""

    mark = FACTS
    companions = (FACTS, "weight.places", "weight.values")
    kind = GgmlConfig

    def config(self, stored: dict[str, Tensor], name: str) -> QuantConfig:
        facts = read_facts(stored, name)
        kind: Any = QUANTIZERS.type_of(facts["type"])
        return kind(outliers=facts.get("outliers", 0))

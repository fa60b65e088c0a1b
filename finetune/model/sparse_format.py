"""Checkpoints that keep only what is not zero, under our own keys (quant/sparse.py)."""

from __future__ import annotations

from torch import Tensor

from finetune.model.facts_format import FactsFormat
from finetune.quant.base import QuantConfig
from finetune.quant.sparse import FACTS, SparseWeightConfig, read_facts


class SparseValues(FactsFormat):
    """Bitmasks and groups."""

    mark = FACTS
    companions = (FACTS, "weight.values")
    kind = SparseWeightConfig

    def config(self, stored: dict[str, Tensor], name: str) -> QuantConfig:
        read_facts(stored, name)
        return SparseWeightConfig()

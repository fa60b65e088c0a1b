"""Checkpoints in our own affine integer codes (quant/affine_storage.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from finetune.model.facts_format import FactsFormat
from finetune.quant.affine_ordered import ORDER
from finetune.quant.affine_storage import FACTS, AffineConfig, name_of, read_facts
from finetune.quant.base import QUANTIZERS, QuantConfig


class AffineCodes(FactsFormat):
    """int8g, int4, int3 and int2."""

    mark = FACTS
    companions = (FACTS, "weight.scale", "weight.zero", ORDER)
    kind = AffineConfig

    def config(self, stored: dict[str, Tensor], name: str) -> QuantConfig:
        facts = read_facts(stored, name)
        kind: Any = QUANTIZERS.type_of(name_of(facts))
        zero = facts["zero_point"]
        symmetric = zero == "none"
        return kind(group_size=facts["group_size"], symmetric=symmetric, zero_point="integer" if symmetric else zero)

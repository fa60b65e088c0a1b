"""What an int8 bitsandbytes checkpoint says of itself, and how to say the same of ours.

Beside each int8 `weight` lie `SCB`, the absmax of its rows, and `weight_format` (bitsandbytes/nn/modules.py,
`Linear8bitLt`). The threshold of outliers is no property of the weights; it stands in config.json.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.model.headers import StoredTensor
from finetune.model.stored_format import Held, StoredFormat
from finetune.quant.base import QuantConfig
from finetune.quant.int8_storage import COLUMNS, REMAINDER, Int8Config


class BnbInt8(StoredFormat):
    """LLM.int8()."""

    mark = "SCB"
    methods = ("bitsandbytes", "finetune")
    derived = False
    companions = ("weight_format", "SCB", COLUMNS, REMAINDER)

    def disguise(self, weight: StoredTensor) -> torch.dtype:
        return torch.int8

    def settings(self, told: dict[str, Any], held: Held, where: str) -> QuantConfig:
        usual = Int8Config().threshold
        threshold = told.get("quant", {}).get("threshold", told.get("llm_int8_threshold", usual))
        if not isinstance(threshold, int | float) or not 0 <= threshold < float("inf"):
            raise ModelError(f"{where}: llm_int8_threshold in config.json is {threshold!r}, expected a number from 0")
        return Int8Config(threshold=float(threshold))

    def settings_of(self, stored: dict[str, Tensor], name: str, quant: QuantConfig) -> QuantConfig:
        return quant if isinstance(quant, Int8Config) else Int8Config()

    def writes(self, quant: QuantConfig) -> bool:
        return isinstance(quant, Int8Config)

    def stock_config(self, quant: QuantConfig, dtype: torch.dtype, kept: list[str]) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        threshold = getattr(quant, "threshold", Int8Config().threshold)
        config = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=float(threshold), llm_int8_skip_modules=sorted(kept)
        )
        return json.loads(config.to_json_string(use_diff=False))

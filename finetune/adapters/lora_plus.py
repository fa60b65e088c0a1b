"""LoRA+: LoRA whose B learns faster than its A.

Hayou et al. 2024 (arXiv:2402.12354): with one learning rate for both, features are not learnt efficiently in wide
models; the rate of B should be a multiple of A's, 16 in the paper's experiments (section 5). Nothing else changes, so
what is saved is a plain LoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from finetune.adapters.base import ADAPTERS
from finetune.adapters.lora import LoRAAdapter, LoRAConfig
from finetune.adapters.lora import build as build_lora
from finetune.errors import ConfigError


@dataclass
class LoRAPlusConfig(LoRAConfig):
    """LoRA's settings and the ratio.

    Attributes:
        ratio: learning rate of B over that of A, which is the run's.
    """

    name: str = "lora_plus"
    learning_rate: float = 0.00025
    ratio: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.ratio > 0 and math.isfinite(self.ratio)):
            raise ConfigError(f"adapter.ratio is {self.ratio}: expected more than 0")


class LoRAPlusAdapter(LoRAAdapter):
    """LoRA+ attached to a model; see `LoRAPlusConfig`."""

    config: LoRAPlusConfig

    def learning_rate_scales(self) -> dict[str, float]:
        """The ratio for every B."""
        return {name: self.config.ratio for name in self.trainable() if name.endswith(".lora_B.weight")}


@ADAPTERS.register(LoRAPlusConfig)
def build(config: LoRAPlusConfig, model: nn.Module) -> LoRAPlusAdapter:
    """Attach LoRA+ to a model, as LoRA is."""
    adapter = build_lora(config, model, LoRAPlusAdapter)
    assert isinstance(adapter, LoRAPlusAdapter)
    return adapter

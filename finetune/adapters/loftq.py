"""LoftQ: LoRA that starts by making good what quantization has cost.

Li et al. 2023 (arXiv:2310.08659), algorithm 1: from A_0 = B_0 = 0, in rounds, Q_t = quantize(W - s B_{t-1} A_{t-1}) and
A_t, B_t the best approximation of W - Q_t by their rank. The first Q is what is stored already, so a single round
leaves the base as it is, and what is saved is a plain LoRA on it; more rounds need a residual base (residual.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from finetune.adapters.base import ADAPTERS
from finetune.adapters.lora import build as build_lora
from finetune.adapters.residual import ResidualAdapter, ResidualConfig
from finetune.adapters.residual_layers import Weight


@dataclass
class LoftQConfig(ResidualConfig):
    """Settings as in `ResidualConfig`. The paper takes five iterations; one keeps the base."""

    name: str = "loftq"


class LoftQAdapter(ResidualAdapter):
    """LoftQ attached to a model; see `LoftQConfig`."""

    config: LoftQConfig
    instead: ClassVar[str] = "it starts there as LoRA"

    def begin(self, weight: Weight) -> None:
        """Alternate; where nothing was lost, or what was lost is not known, LoRA's own start stays."""
        if not weight.original:
            return
        a_RI, b_OR = weight.factors(weight.w_OI - weight.decoded(weight.module.base))
        for _ in range(self.config.iterations - 1):
            residual = weight.quantized(weight.rest(a_RI, b_OR))
            a_RI, b_OR = weight.factors(weight.w_OI - weight.decoded(residual))
            weight.module.take(residual)
        weight.put(a_RI, b_OR)


@ADAPTERS.register(LoftQConfig)
def build(config: LoftQConfig, model: nn.Module) -> LoftQAdapter:
    """Attach LoftQ to a model, as LoRA is; `attach` then has it find its start."""
    adapter = build_lora(config, model, LoftQAdapter)
    assert isinstance(adapter, LoftQAdapter)
    return adapter

"""AdamW with 32-bit state (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.errors import ConfigError
from finetune.training.config import OPTIMIZERS, OptimConfig, TrainConfig
from finetune.training.optimizers.parameter_groups import Parameters


@dataclass
class AdamWConfig(OptimConfig):
    """AdamW.

    Attributes:
        betas: decay of the running mean and of the running square, each in [0, 1).
        eps: added to the root of the running square.
        weight_decay: share of a weight taken away per step, times the learning rate.
    """

    name: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas is {self.betas}: expected two numbers in [0, 1)")
        if not self.eps > 0:
            raise ConfigError(f"optim.eps is {self.eps}: expected more than 0")
        if self.weight_decay < 0:
            raise ConfigError(f"optim.weight_decay is {self.weight_decay}: expected 0 or more")

    def settings(self, train: TrainConfig) -> dict[str, Any]:
        """Keyword arguments that torch's and bitsandbytes' optimizers share."""
        return {
            "lr": train.learning_rate or 0.0,  # each step sets its own
            "betas": tuple(self.betas),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }


@OPTIMIZERS.register(AdamWConfig)
def build(
    config: AdamWConfig, parameters: Parameters, train: TrainConfig, device: torch.device
) -> tuple[torch.optim.Optimizer, str | None]:
    """torch's own AdamW; on a CPU in one pass over the weights, which takes a quarter of the time of its default."""
    return torch.optim.AdamW(parameters, **config.settings(train), fused=True if device.type == "cpu" else None), None

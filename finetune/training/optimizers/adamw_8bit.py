"""8-bit AdamW: state in blocks of 8-bit codes (Dettmers et al. 2022, arXiv:2110.02861)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetune.training.config import OPTIMIZERS, TrainConfig
from finetune.training.optimizers.adamw import AdamWConfig
from finetune.training.optimizers.bitsandbytes_state import build_or_adamw
from finetune.training.optimizers.parameter_groups import Parameters


@dataclass
class AdamW8bitConfig(AdamWConfig):
    """AdamW's settings; `bitsandbytes.optim.AdamW8bit` where the device has it."""

    name: str = "adamw_8bit"


@OPTIMIZERS.register(AdamW8bitConfig)
def build(
    config: AdamW8bitConfig, parameters: Parameters, train: TrainConfig, device: torch.device
) -> tuple[torch.optim.Optimizer, str | None]:
    """bitsandbytes' optimizer, else torch's AdamW and a line that says why."""
    return build_or_adamw("AdamW8bit", config.name, parameters, config.settings(train), device)

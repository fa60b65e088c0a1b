"""AdamW whose 32-bit state lives in memory that the device pages out when it is short.

Dettmers et al. 2023, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetune.training.config import OPTIMIZERS, TrainConfig
from finetune.training.optimizers.adamw import AdamWConfig
from finetune.training.optimizers.bitsandbytes_state import build_or_adamw
from finetune.training.optimizers.parameter_groups import Parameters


@dataclass
class PagedAdamWConfig(AdamWConfig):
    """AdamW's settings; `bitsandbytes.optim.PagedAdamW` where the device has it."""

    name: str = "paged_adamw"


@OPTIMIZERS.register(PagedAdamWConfig)
def build(
    config: PagedAdamWConfig, parameters: Parameters, train: TrainConfig, device: torch.device
) -> tuple[torch.optim.Optimizer, str | None]:
    """bitsandbytes' optimizer, else torch's AdamW and a line that says why."""
    return build_or_adamw("PagedAdamW", config.name, parameters, config.settings(train), device)

"""Houlsby: a bottleneck after attention and one after the feed-forward of every block, each before the residual.

Houlsby et al. 2019 (arXiv:1902.00751) section 2.1; as there, the norms train too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from finetune.adapters.base import ADAPTERS
from finetune.adapters.bottleneck import BottleneckAdapter, BottleneckConfig, attach_bottlenecks


@dataclass
class HoulsbyConfig(BottleneckConfig):
    """Houlsby's adapters."""

    name: str = "houlsby"
    learning_rate: float = 0.004
    norms: bool = True


@ADAPTERS.register(HoulsbyConfig)
def build(config: HoulsbyConfig, model: nn.Module) -> BottleneckAdapter:
    """Attach Houlsby's adapters to a model."""
    return attach_bottlenecks(config, model)

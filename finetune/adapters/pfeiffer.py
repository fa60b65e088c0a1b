"""Pfeiffer: a bottleneck after the feed-forward of every block, before the residual.

Pfeiffer et al. 2021 (arXiv:2005.00247) section 3.3: half of Houlsby's adapters do as well. In BERT theirs follows the
norm after the residual; where norms come before the sub-layers, this is the place that corresponds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from finetune.adapters.base import ADAPTERS
from finetune.adapters.bottleneck import BottleneckAdapter, BottleneckConfig, attach_bottlenecks


@dataclass
class PfeifferConfig(BottleneckConfig):
    """Pfeiffer's adapters."""

    after_attention: ClassVar[bool] = False

    name: str = "pfeiffer"
    learning_rate: float = 0.004


@ADAPTERS.register(PfeifferConfig)
def build(config: PfeifferConfig, model: nn.Module) -> BottleneckAdapter:
    """Attach Pfeiffer's adapters to a model."""
    return attach_bottlenecks(config, model)

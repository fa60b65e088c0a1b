"""No pruning."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.quant.pruners.base import PRUNERS, PrunerConfig


@dataclass
class NoneConfig(PrunerConfig):
    """Every weight stays; what was zero in a pruned base stays zero all the same."""

    name: str = "none"


@PRUNERS.register(NoneConfig)
def build(config: NoneConfig) -> None:
    """Nothing prunes."""
    return None

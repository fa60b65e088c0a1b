"""Round to nearest: every weight takes the code nearest to it, whatever the inputs look like."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from finetune.quant.grid import Grid
from finetune.quant.rounders.base import CALIBRATORS, CalibratorConfig, Choice, Rounder


@dataclass
class RTNConfig(CalibratorConfig):
    """No settings, and no data: what loading a dense checkpoint with `quant=...` does."""

    name: str = "rtn"


@CALIBRATORS.register(RTNConfig)
class RTN(Rounder):
    """The codes that `store` chooses, bit for bit."""

    def __init__(self, config: RTNConfig | None = None) -> None:
        self.config = config or RTNConfig()

    def choose(self, grid: Grid, w_OI: Tensor, gram_II: Tensor) -> Choice | None:
        return None

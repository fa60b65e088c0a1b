"""Regression: the squared error of one number a row.

Shape suffixes: B rows of a batch, N rows of the held-out set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.metrics import regression_metrics
from finetune.training.config import OBJECTIVES, ObjectiveConfig
from finetune.training.judging import Judgements, Judging


@dataclass
class RegressionConfig(ObjectiveConfig):
    """Squared error a row, summed, in the square of the labels' own unit."""

    task: ClassVar[str] = "regression"

    name: str = "regression"


@OBJECTIVES.register(RegressionConfig)
def build(config: RegressionConfig, model: nn.Module) -> Regression:
    """The objective for a model that was loaded for this task, adapter attached or not."""
    return Regression(model)


class Regression(Judging):
    """Summed squared error over rows; see `Judging`."""

    unit = "squared error per row"

    def of_logits(self, logits_BC: Tensor, targets_B: Tensor) -> Judgements:
        """Squared error, and the number itself."""
        predicted_B = logits_BC[:, 0]
        return Judgements(F.mse_loss(predicted_B, targets_B.float(), reduction="sum"), predicted_B)

    def metrics(self, predicted_N: np.ndarray, targets_N: np.ndarray) -> dict[str, float | None]:
        """Mean squared error, Pearson and Spearman correlation."""
        return regression_metrics(predicted_N, targets_N)

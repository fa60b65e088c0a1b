"""Classification: cross entropy between the classes of a row.

Shape suffixes: B rows of a batch, N rows of the held-out set, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.metrics import classification_metrics
from finetune.training.config import OBJECTIVES, ObjectiveConfig
from finetune.training.judging import Judgements, Judging


@dataclass
class ClassificationConfig(ObjectiveConfig):
    """Cross entropy in nats a row, summed; the classes are those of data.train."""

    task: ClassVar[str] = "classification"

    name: str = "classification"


@OBJECTIVES.register(ClassificationConfig)
def build(config: ClassificationConfig, model: nn.Module) -> Classification:
    """The objective for a model that was loaded for this task, adapter attached or not."""
    return Classification(model)


class Classification(Judging):
    """Summed cross entropy over rows; see `Judging`."""

    unit = "nats per row"

    def of_logits(self, logits_BC: Tensor, targets_B: Tensor) -> Judgements:
        """Cross entropy, and the likeliest class."""
        return Judgements(F.cross_entropy(logits_BC, targets_B, reduction="sum"), logits_BC.argmax(-1))

    def metrics(self, predicted_N: np.ndarray, targets_N: np.ndarray) -> dict[str, float | None]:
        """Accuracy, F1 and Matthews correlation."""
        return classification_metrics(predicted_N, targets_N, int(self.model.config.num_labels))  # type: ignore[union-attr, arg-type]

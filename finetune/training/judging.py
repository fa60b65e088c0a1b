"""What classification and regression share: one answer a row, by a model with a head of its own.

The model pools as its family does (the last token that is no padding, the first token, a pooler): it is called whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from finetune.data.rows import Batch
from finetune.errors import ConfigError


@dataclass(frozen=True)
class Judgements:
    """What a model says of the rows of a batch.

    Attributes:
        loss: summed over the rows, float32 with a graph.
        predicted_B: class numbers, or numbers in float32.
    """

    loss: Tensor
    predicted_B: Tensor


class Judging(ABC):
    """An objective over whole rows.

    Attributes:
        model: called with `Batch.model_inputs()`, gives `.logits` [B, outputs].
        note: nothing to tell.
        unit: of the loss, in words.
    """

    note: str | None = None
    unit: str

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss (float32 scalar with a graph) and the number of rows."""
        return self.judge(batch).loss, len(batch.input_ids_BS)

    def judge(self, batch: Batch) -> Judgements:
        """Loss and judgements of a batch.

        Raises:
            ConfigError: for rows without a target.
        """
        if batch.targets_B is None:
            raise ConfigError("the rows have no label: read them with data.format=labelled")
        return self.of_logits(self.model(**batch.model_inputs()).logits.float(), batch.targets_B)

    @abstractmethod
    def of_logits(self, logits_BC: Tensor, targets_B: Tensor) -> Judgements:
        """Loss and judgements by the head's outputs in float32."""

    @abstractmethod
    def metrics(self, predicted_N: np.ndarray, targets_N: np.ndarray) -> dict[str, float | None]:
        """Figures over all held-out rows, by name; larger is better, but for errors."""

"""Sequence to sequence: cross entropy of what a decoder writes, given what its encoder has read.

Shape suffixes: B rows, T positions of what is written, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.rows import IGNORE, Batch, PairBatch
from finetune.errors import ConfigError
from finetune.training.config import OBJECTIVES, ObjectiveConfig


@dataclass
class Seq2SeqConfig(ObjectiveConfig):
    """Cross entropy in nats a token of the answers, summed."""

    task: ClassVar[str] = "seq2seq"

    name: str = "seq2seq"


@OBJECTIVES.register(Seq2SeqConfig)
def build(config: Seq2SeqConfig, model: nn.Module) -> Seq2Seq:
    """The objective for a model that was loaded for this task, adapter attached or not."""
    return Seq2Seq(model)


class Seq2Seq:
    """Summed cross entropy over the tokens of answers. The model itself makes what its decoder reads of the labels.

    Attributes:
        model: called with `PairBatch.model_inputs()`, gives `.logits` [B, T, V].
        note: nothing to tell.
    """

    note: str | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss over the tokens of answers (float32 scalar with a graph) and their number.

        Raises:
            ConfigError: for rows that are one text.
        """
        if not isinstance(batch, PairBatch):
            raise ConfigError("the rows have no side to read: prepare them for objective=seq2seq")
        labels_BT = batch.labels_BS
        logits_BTV = self.model(**batch.model_inputs()).logits
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return loss, int((labels_BT != IGNORE).sum())

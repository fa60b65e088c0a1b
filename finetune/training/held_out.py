"""Held-out loss in the middle of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from finetune.data.batching import eval_batches
from finetune.data.rows import Batch, TokenRows
from finetune.evaluation import loss_per_token
from finetune.training.group import Group
from finetune.training.protocols import Objective
from finetune.training.signals import StopSignals


class HeldOut:
    """Measures the loss over held-out rows, shared out among the processes; leaves mode and random state alone."""

    def __init__(
        self, model: nn.Module, rows: TokenRows, objective: Objective, group: Group, *, batch_size: int, pad_id: int
    ) -> None:
        self.model, self.rows, self.objective, self.group = model, rows, objective, group
        self.batch_size, self.pad_id = batch_size, pad_id

    def loss(self, signals: StopSignals) -> float | None:
        """Nats per learnt token; None where there is nothing to measure, or where a signal cut it short."""
        if not len(self.rows):
            return None
        training = self.model.training
        self.model.eval()
        try:
            with self.group.together():
                measured = loss_per_token(self.objective.loss_sum, self._share(signals))
        finally:
            self.model.train(training)
        share = [measured.loss * measured.tokens, float(measured.tokens)] if measured.tokens else [0.0, 0.0]
        total, tokens, cut = self.group.sum([*share, float(signals.received is not None)])
        return None if cut or not tokens else total / tokens

    def _share(self, signals: StopSignals) -> Iterator[Batch]:
        batches: Any = eval_batches(self.rows, self.batch_size, self.pad_id)
        for index, batch in enumerate(batches):
            if signals.received is not None:
                return
            if index % self.group.world == self.group.rank:
                yield batch.to(self.group.device)


def seed_processes(seed: int, group: Group) -> None:
    """Give every process its own stream of dropout masks, decided by the seed."""
    torch.manual_seed(seed + group.rank)

"""Held-out loss in the middle of training, and what else says how good the judgements of rows are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.batching import eval_batches
from finetune.data.rows import Batch, TokenRows
from finetune.evaluation import loss_per_token
from finetune.training.group import Group
from finetune.training.judging import Judging
from finetune.training.protocols import Objective
from finetune.training.signals import StopSignals


class HeldOut:
    """Measures the loss over held-out rows, shared out among the processes; leaves mode and random state alone.

    Attributes:
        metrics: of the last measurement, where rows are judged as a whole; empty for tokens.
    """

    def __init__(
        self, model: nn.Module, rows: TokenRows, objective: Objective, group: Group, *, batch_size: int, pad_id: int
    ) -> None:
        self.model, self.rows, self.objective, self.group = model, rows, objective, group
        self.batch_size, self.pad_id = batch_size, pad_id
        self.metrics: dict[str, float | None] = {}

    def loss(self, signals: StopSignals) -> float | None:
        """Mean loss per learnt token or row; None where there is nothing to measure, or where a signal cut it short."""
        if not len(self.rows):
            return None
        training = self.model.training
        self.model.eval()
        try:
            with self.group.together():
                judged = _Judged(self.objective) if isinstance(self.objective, Judging) else None
                loss_sum = self.objective.loss_sum if judged is None else judged.loss_sum
                measured = loss_per_token(loss_sum, self._share(signals))
        finally:
            self.model.train(training)
        share = [measured.loss * measured.tokens, float(measured.tokens)] if measured.tokens else [0.0, 0.0]
        total, tokens, cut = self.group.sum([*share, float(signals.received is not None)])
        if judged is not None:
            predicted, targets = (self.group.concatenate(values) for values in (judged.predicted, judged.targets))
            self.metrics = {} if cut else judged.objective.metrics(np.array(predicted), np.array(targets))
        return None if cut or not tokens else total / tokens

    def _share(self, signals: StopSignals) -> Iterator[Batch]:
        batches: Any = eval_batches(self.rows, self.batch_size, self.pad_id)
        for index, batch in enumerate(batches):
            if signals.received is not None:
                return
            if index % self.group.world == self.group.rank:
                yield batch.to(self.group.device)


class _Judged:
    """Sums up the losses of rows and keeps what was said of them, in the order of the batches."""

    def __init__(self, objective: Judging) -> None:
        self.objective = objective
        self.predicted: list[float] = []
        self.targets: list[float] = []

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """As the objective's own."""
        judged = self.objective.judge(batch)
        assert batch.targets_B is not None
        self.predicted += judged.predicted_B.double().tolist()
        self.targets += batch.targets_B.double().tolist()
        return judged.loss, len(batch.targets_B)


def seed_processes(seed: int, group: Group) -> None:
    """Give every process its own stream of dropout masks, decided by the seed."""
    torch.manual_seed(seed + group.rank)

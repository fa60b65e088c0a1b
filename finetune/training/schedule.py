"""The learning rate as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from finetune.adapters.base import Learner
from finetune.adapters.rates import own_rate
from finetune.training.config import TrainConfig


def peak(config: TrainConfig, adapter: Learner) -> float:
    """The peak of a run: what `train.learning_rate` says, else the one that suits the method there."""
    return own_rate(adapter) if config.learning_rate is None else config.learning_rate


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of step `step` (from 0) of `total`: a linear rise to the peak, then cosine or linear to 0, or
    constant.

    Args:
        config: with its `learning_rate` set.
    """
    assert config.learning_rate is not None
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shapes = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * shapes[config.schedule]

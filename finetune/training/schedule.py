"""The learning rate as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from typing import Any

from finetune.adapters.base import AdapterConfig
from finetune.training.config import TrainConfig

WIDTH = 256
"""Hidden size of the base that adapters' own learning rates are for."""


def peak(config: TrainConfig, method: AdapterConfig, model: Any) -> float:
    """The peak of a run: what `train.learning_rate` says, else the method's own rate, less for wider bases.

    Adam moves every weight by about the learning rate, and what a projection adds up grows with its inputs: the rate
    that suits falls with the width (Yang et al. 2022, arXiv:2203.03466, table 3).

    Args:
        method: of the adapter; its rate is for a base of `WIDTH`.
        model: of transformers; where it does not say how wide it is, the rate stands.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    return method.learning_rate * (_by_width(model) if method.by_width else 1.0)


def _by_width(model: Any) -> float:
    """WIDTH over the hidden size, at most 1."""
    described: Any = getattr(model, "config", None)
    text = described.get_text_config() if hasattr(described, "get_text_config") else described
    return min(1.0, WIDTH / (getattr(text, "hidden_size", None) or WIDTH))


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

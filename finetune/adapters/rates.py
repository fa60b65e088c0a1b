"""How fast an adapter learns where the run names no rate, and what of it learns at another rate than the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from finetune.adapters.base import Learner
from finetune.adapters.targets import matches

WIDTH = 256
"""Hidden size of the base that methods' own rates are for."""
WHOLE = 2e-3
"""What suits the weights of a base of that width, as LoRA's do."""


def own_rate(adapter: Learner) -> float:
    """The peak that suits a method on a model, with a head made for the task or without."""
    method = adapter.config
    rate = method.learning_rate * (by_width(adapter.model) if method.by_width else 1.0)
    return rate * (method.beside_head if adapter.task_head else 1.0)


def by_width(model: nn.Module) -> float:
    """WIDTH over the hidden size, at most 1; 1 where the model does not say how wide it is.

    Adam moves every weight by about the learning rate, and what a projection adds up grows with its inputs: the rate
    that suits falls with the width (Yang et al. 2022, arXiv:2203.03466, table 3).
    """
    described: Any = getattr(model, "config", None)
    text = described.get_text_config() if hasattr(described, "get_text_config") else described
    return min(1.0, WIDTH / (getattr(text, "hidden_size", None) or WIDTH))


def whole_scales(adapter: Learner) -> dict[str, float]:
    """Factors on the rate for modules that train whole beside a method: weights of a base want no more than LoRA's,
    however fast biases, factors or virtual tokens learn. By names of what trains."""
    scale, trains = min(1.0, WHOLE * by_width(adapter.model) / own_rate(adapter)), adapter.trainable()
    modules = [*adapter.config.train_also, *adapter.task_head]
    copies = [name for name in adapter.copies if any(matches(pattern, name) for pattern in modules)]
    return {name: scale for name in trains if any(name.startswith(f"{copy}.trained.") for copy in copies)}

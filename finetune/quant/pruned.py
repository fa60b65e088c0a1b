"""Bases that were pruned: how a model says so, and what is to stay zero in it.

config.json of a pruned checkpoint has a key for it, which goes with the model's configuration into whatever is
exported. Which weights are masked is what is stored: those that are exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from finetune.quant.base import FrozenWeight

KEY = "pruning"
"""In config.json: {"method", "sparsity", "pattern"}."""


def said_pruned(config: Any) -> bool:
    """Whether a configuration, of transformers or as it is in the file, says that its weights were pruned."""
    told = config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY, None)
    return bool(told)


def mark_pruned(model: nn.Module) -> None:
    """Tell the frozen weights of a model whose configuration says so that their zeros are to stay."""
    if said_pruned(getattr(model, "config", None)):
        for module in model.modules():
            if isinstance(module, FrozenWeight):
                module.pruned = True

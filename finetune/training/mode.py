"""The mode that a model trains in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from finetune.errors import RunError


@contextmanager
def training_mode(model: nn.Module, gradient_checkpointing: bool) -> Iterator[None]:
    """Training mode, with activations recomputed where asked for; both undone at the end.

    Raises:
        RunError: where the model cannot recompute its activations.
    """
    # transformers renamed it in 5.23; the old name goes in 6
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if gradient_checkpointing:
        try:
            enable: Any = getattr(model, f"{name}_checkpointing_enable", None)
            # The reentrant kind gives no gradient to a block whose input needs none, which starves every adapter in it.
            enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
        except (TypeError, ValueError) as error:
            raise RunError(f"train.gradient_checkpointing=true, but {type(model).__name__} cannot: {error}") from None
    model.train()
    try:
        yield
    finally:
        model.eval()
        if gradient_checkpointing:
            getattr(model, f"{name}_checkpointing_disable")()

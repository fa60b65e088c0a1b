"""How to try something on a model: in which mode, on a twin without weights, with other settings, what it may raise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from finetune.errors import UserError

UNFORESEEN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model raises that does something an experiment does not foresee: it is not understood, which is the answer."""


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode within; each module's own mode again after."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def twin_of(model: nn.Module, attention: str = "eager") -> nn.Module:
    """The model on the meta device, without weights, its experts written out in torch's own operations.

    Args:
        attention: the implementation that transformers is asked for; by default written out as well.
    """
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = attention
    with torch.device("meta"):
        twin = type(model)(config).eval()
    choose = getattr(twin, "set_experts_implementation", None)
    if choose is not None:
        choose("batched_mm")  # the only way without control flow that depends on values
    return twin.requires_grad_(False)


def attempt(build: Callable[[Any], nn.Module], config: Any, settings: Mapping[str, Any]) -> nn.Module | None:
    """The model of a changed configuration, as it is after it was saved and read; None where it contradicts itself.

    Args:
        build: makes the model of a configuration, on the meta device.
        settings: what is changed, by the names of entries.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        changed = with_settings(config, settings)
        return build(type(changed).from_dict(changed.to_dict()))
    except (*UNFORESEEN, UserError, StrictDataclassError):
        return None


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """A configuration with other values."""
    changed = copy.deepcopy(config)
    for key, value in settings.items():
        setattr(changed.get_text_config(), key, value)
    return changed

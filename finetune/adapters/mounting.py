"""How an adapter gets into a model and out again: by exchanging modules, in this one place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from finetune.errors import ConfigError


class Mounted(nn.Module):
    """A module that stands in a model because an adapter put it there."""


def check_bare(model: nn.Module) -> None:
    """Refuse a model that an adapter is mounted in.

    Raises:
        ConfigError: saying so.
    """
    if any(isinstance(module, Mounted) for module in model.modules()):
        raise ConfigError("the model has an adapter attached already: load the base anew, or keep that one")


def place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of those that have their names."""
    for name, module in modules.items():
        model.set_submodule(name, module)

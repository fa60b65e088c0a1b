"""How an adapter gets into a model and out again: by exchanging modules, in this one place.

Several adapters may stand at one place: each is the `base` of the next. Where they may is `over` and `under`; in which
order is `level`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

from torch import nn

from finetune.errors import ConfigError


class Mounted(nn.Module):
    """A module that stands in a model because an adapter put it there.

    Attributes:
        base: where it stands for a module: that one, or what another adapter has put in its place before.
        method: name of the adapter's method.
        level: what has a higher one stands further out, wherever several stand at one place.
    """

    over: ClassVar[bool] = False
    """Whether it may stand over what another adapter has put there: it does nothing with its base but call it."""
    under: ClassVar[bool] = False
    """Whether another may stand over it: what it computes is what its `forward` gives."""

    method: str = ""
    level: int = 0


class SeenThrough(Mounted):
    """What the module under it offers besides (`weight`, `padding_idx`, an attribute of a family's) is read through."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}):  # not built yet, or being copied
                raise
            return getattr(self.base, name)


class Switched(Protocol):
    """What computes what is beneath it alone while it is not enabled."""

    enabled: bool


@contextmanager
def switched_off(parts: Iterable[Switched]) -> Iterator[None]:
    """Within it these are not enabled; afterwards they are what they were."""
    before = [(part, part.enabled) for part in parts]
    try:
        for part, _ in before:
            part.enabled = False
        yield
    finally:
        for part, enabled in before:
            part.enabled = enabled


def check_bare(model: nn.Module) -> None:
    """Refuse a model that an adapter is mounted in.

    Raises:
        ConfigError: saying so, and which.
    """
    for module in model.modules():
        if isinstance(module, Mounted):
            which = f"adapter={module.method}" if module.method else "an adapter"
            raise ConfigError(
                f"the model has {which} attached already: load the base anew, or hold several by"
                f" finetune.Adapters(model)"
            )


def place(model: nn.Module, modules: Mapping[str, Mounted], method: str = "") -> None:
    """Put modules in the place of those that have their names, over what other adapters have put there.

    They take on the model's mode, and the device of what they stand for: both may have changed while they were out.
    """
    for name, module in modules.items():
        holder, leaf = _seat(model, name)
        below = getattr(holder, leaf)
        while isinstance(below, Mounted) and below is not module and below.level > module.level:
            holder, leaf, below = below, "base", below.base
        if below is module:  # of two adapters that share it
            continue
        module.method = method or module.method
        follow(module, model, below)
        module.base = below
        setattr(holder, leaf, module)


def lift(model: nn.Module, modules: Mapping[str, Mounted]) -> None:
    """Take modules out again, whatever stands over or under them; they stand for the model's own ones from then on."""
    for name, module in modules.items():
        holder, leaf = _seat(model, name)
        found = getattr(holder, leaf)
        while isinstance(found, Mounted) and found is not module:
            holder, leaf, found = found, "base", found.base
        if found is module:
            setattr(holder, leaf, module.base)
            module.base = ground(module)


def ground(module: nn.Module) -> nn.Module:
    """The model's own module under what adapters have put in its place."""
    while isinstance(module, Mounted):
        module = module.base  # type: ignore[assignment]
    return module


def follow(module: nn.Module, model: nn.Module, beside: nn.Module) -> None:
    """Give a module that is about to be mounted the mode of the model, and the device of what it will stand beside."""
    module.base = nn.Identity()  # what it stands for is the model's, and stays as it is
    module.train(model.training)
    device = next((p.device for p in beside.parameters()), None)
    if device is not None and any(p.device != device for p in module.parameters()):
        module.to(device)


def _seat(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the one of a dotted name, and its name there; what adapters put between is seen through."""
    *path, leaf = name.split(".")
    holder: nn.Module = model
    for part in path:
        holder = getattr(_within(holder, part), part)
    return _within(holder, leaf), leaf


def _within(holder: nn.Module, child: str) -> nn.Module:
    """Where a child is: in the module itself, or in what that stands for."""
    while isinstance(holder, Mounted) and child not in dict(holder.named_children()):
        holder = holder.base  # type: ignore[assignment]
    return holder

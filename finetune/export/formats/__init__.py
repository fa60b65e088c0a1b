"""Export formats, one a file: a module here that holds `FORMAT = Format(...)` is a format."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from finetune.errors import ConfigError, nearest
from finetune.export.base import Format

AUTOMATIC = ("safetensors", "bnb-nf4", "peft")
"""What `export.formats=auto` writes, as far as the adapter allows: merged in 16 bits, in 4, and the adapter alone; and
formats for some methods alone where it is one of these."""


def formats() -> dict[str, Format]:
    """Every format by its name, in alphabetical order."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.FORMAT.name: module.FORMAT for module in sorted(modules, key=lambda module: module.FORMAT.name)}


def chosen(names: Sequence[str]) -> list[Format]:
    """The formats called `names`, in that order.

    Raises:
        ConfigError: when there is none of a name, naming the nearest.
    """
    have = formats()
    for name in names:
        if name not in have:
            known = ", ".join(have)
            raise ConfigError(f"export.formats: no format is called {name!r}: have {known}{nearest(name, have)}")
    return [have[name] for name in names]

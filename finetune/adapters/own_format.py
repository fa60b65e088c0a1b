"""Settings of saved adapters whose method PEFT does not have: adapter_config.json holds them under our own names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from finetune.adapters import peft_format
from finetune.adapters.base import AdapterConfig
from finetune.errors import ModelError, UserError

Config = TypeVar("Config", bound=AdapterConfig)


def as_saved(config: Config, directory: Path, keys: Iterable[str]) -> Config:
    """The configuration with those of a saved adapter's settings that decide which tensors it has.

    Args:
        keys: of these settings.

    Raises:
        ModelError: when it is of another method, or its settings are missing or broken.
    """
    saved = peft_format.read_config(directory)
    peft_format.check_method(directory, saved, {"finetune_method": config.name})
    path = directory / peft_format.CONFIG
    own = {}
    for key in keys:
        if key not in saved:
            raise ModelError(f"{path} has no {key}: expected what finetune writes for adapter={config.name}")
        own[key] = saved[key]
    try:
        return replace(config, **own)
    except (UserError, TypeError) as error:
        raise ModelError(f"{path}: {error}") from error

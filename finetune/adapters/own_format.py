"""Settings of saved adapters whose method PEFT does not have: adapter_config.json holds them under our own names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from finetune.adapters import peft_format
from finetune.adapters.base import AdapterConfig
from finetune.adapters.peft_lora import Saved, parse_saved
from finetune.errors import ModelError, UserError

UNSAVED = ("name", "path", "allow_other_quant", "learning_rate")
"""Settings that say how an adapter is loaded or trained, not what it is."""

Config = TypeVar("Config", bound=AdapterConfig)


def own_settings(config: AdapterConfig) -> dict[str, Any]:
    """adapter_config.json: the settings themselves, as JSON gives them back (tuples are lists)."""
    own = {key: value for key, value in asdict(config).items() if key not in UNSAVED}
    return {peft_format.OWN_METHOD: config.name, **json.loads(json.dumps(own))}


def as_saved(config: Config, directory: Path, keys: Iterable[str]) -> Config:
    """The configuration with those of a saved adapter's settings that decide which tensors it has.

    Args:
        keys: of these settings.

    Raises:
        ModelError: when it is of another method, or its settings are missing or broken.
    """
    saved = peft_format.read_config(directory)
    peft_format.check_method(directory, saved, {peft_format.OWN_METHOD: config.name})
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


def read_as_lora(directory: Path, method: str, besides: Iterable[str] = ()) -> Saved:
    """The settings of a method that has LoRA's but that PEFT does not compute.

    Args:
        besides: keys that it has over LoRA's.

    Raises:
        ModelError: when it is of another method, or its settings are missing or broken.
    """
    config = peft_format.read_config(directory)
    peft_format.check_method(directory, config, {peft_format.OWN_METHOD: method})
    plain = {key: value for key, value in config.items() if key not in (peft_format.OWN_METHOD, *besides)}
    return parse_saved(plain | {"peft_type": "LORA"}, directory / peft_format.CONFIG)

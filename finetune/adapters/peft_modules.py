"""What PEFT's adapter_config.json says about methods whose settings are lists of modules: (IA)^3 and LN tuning.

Sources: peft 0.21 `tuners/ia3`, `tuners/ln_tuning`. Settings that we do not honour are refused by name, also those that
a later PEFT will invent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.adapters import peft_format
from finetune.adapters.targets import ALL_LINEAR
from finetune.errors import ModelError

Names = str | Sequence[str]
LISTS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
"""Keys that hold a list of names or, but for the last, a regular expression."""
HARMLESS = frozenset({
    "peft_type", "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "fan_in_fan_out", "init_ia3_weights", "runtime_config",
})  # fmt: skip
"""Keys that say nothing about the saved weights but where they come from."""


@dataclass(frozen=True)
class Saved:
    """The part of adapter_config.json that decides what such an adapter computes; names as in PEFT."""

    target_modules: Names = ()
    feedforward_modules: Names = ()
    modules_to_save: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def adapts(self, name: str) -> bool:
        """Whether PEFT would adapt the module of that name, were it of the right kind."""
        return peft_format.targeted(name, self.target_modules, self.settings)

    def is_feedforward(self, name: str) -> bool:
        """Whether PEFT would scale the input of that module (`IA3Model._check_target_module_feedforward`)."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(self.feedforward_modules, name) is not None
        return any(name.endswith(ending) for ending in self.feedforward_modules)


def read_saved(directory: Path, method: str) -> Saved:
    """Read the adapter_config.json of a method by its `peft_type`.

    Raises:
        ModelError: when it is missing or broken, of another method, or asks for something we do not compute.
    """
    config = peft_format.read_config(directory)
    path = directory / peft_format.CONFIG
    peft_format.check_plain(config, path, method, HARMLESS.union(LISTS))
    for key in LISTS:
        if not _is_names(config.get(key), pattern=key != "modules_to_save"):
            raise ModelError(f"{path}: {key} is {config[key]!r}: expected a list of names or a regular expression")
    targets, feedforward, whole = (config.get(key) or () for key in (LISTS[0], *LISTS[2:]))
    return Saved(targets, feedforward, whole, settings=config)


def written(
    method: str, lists: Mapping[str, Iterable[str]], base: str | None, task_type: str, **more: Any
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        lists: by PEFT's keys.
        base: path or hub id of the base.
        task_type: what the model gives, as PEFT calls it.
        more: further keys of the method.
    """
    named = {key: list(names) or None for key, names in lists.items()}
    common = {"peft_type": method, "task_type": task_type, "inference_mode": True}
    return common | {"base_model_name_or_path": base or None} | named | more


def _is_names(value: Any, pattern: bool) -> bool:
    """Nothing, names, or a regular expression where one is allowed."""
    if value is None or value == ALL_LINEAR:
        return value is None or pattern
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error:
            return False
        return pattern
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)

"""Parameter-efficient fine-tuning of language models on a frozen, quantized base.

    import finetune as ft
    model, tokenizer = ft.load("path-or-hub-id", quant=ft.NF4Config())
    adapter = ft.attach(model, ft.LoRAConfig(rank=16, alpha=32))
    result = ft.train(model, tokenizer, data="rows.jsonl", adapter=adapter)
    ft.export(model, tokenizer, "out/", formats=["bnb-nf4"])

Importing this package costs nothing: every name is looked up when it is first used.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

_PUBLIC = {
    "load": "finetune.api",
    "attach": "finetune.api",
    "Adapters": "finetune.api",
    "train": "finetune.api",
    "export": "finetune.api",
    "DataConfig": "finetune.data.config",
    "ModelConfig": "finetune.model.config",
    "Task": "finetune.model.task",
    "TrainConfig": "finetune.training.config",
    "UserError": "finetune.errors",
}
__all__ = sorted(_PUBLIC)
_REGISTRIES = {"ADAPTERS": "finetune.adapters.base", "QUANTIZERS": "finetune.quant.base"}
"""Whose config types are found here too, plug-ins' as well: `finetune.PrefixConfig`, `finetune.Int4Config`."""


class _Package(types.ModuleType):
    """The package with `export` as the function. There is a room of that name too, and importing a submodule binds it
    on its package; a property stands before that binding, so `ft.export(...)` works whatever was imported first."""

    @property
    def export(self) -> Any:
        """`finetune.api.export`."""
        return importlib.import_module(_PUBLIC["export"]).export

    @export.setter
    def export(self, room: types.ModuleType) -> None:
        """What the import system binds stays reachable as `sys.modules["finetune.export"]`."""


def _configs() -> dict[str, type]:
    registries = (getattr(importlib.import_module(module), name) for name, module in _REGISTRIES.items())
    return {config.__name__: config for registry in registries for config in registry.types().values()}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name.endswith("Config") and name in (configs := _configs()):
        return configs[name]
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_PUBLIC, *_configs()})


sys.modules[__name__].__class__ = _Package

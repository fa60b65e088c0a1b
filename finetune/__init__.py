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
    "NF4Config": "finetune.quant.nf4",
    "FP4Config": "finetune.quant.fp4",
    "DenseConfig": "finetune.quant.dense",
    "Int8Config": "finetune.quant.int8_storage",
    "Int8gConfig": "finetune.quant.affine",
    "Int4Config": "finetune.quant.affine",
    "Int3Config": "finetune.quant.affine",
    "Int2Config": "finetune.quant.affine",
    "Q4_0Config": "finetune.quant.ggml",
    "Q4_1Config": "finetune.quant.ggml",
    "Q5_0Config": "finetune.quant.ggml",
    "Q5_1Config": "finetune.quant.ggml",
    "Q8_0Config": "finetune.quant.ggml",
    "LoRAConfig": "finetune.adapters.lora",
    "LoRAPlusConfig": "finetune.adapters.lora_plus",
    "DoRAConfig": "finetune.adapters.dora",
    "IA3Config": "finetune.adapters.ia3",
    "BitFitConfig": "finetune.adapters.bitfit",
    "NormTuningConfig": "finetune.adapters.norm_tuning",
    "HoulsbyConfig": "finetune.adapters.houlsby",
    "StackConfig": "finetune.adapters.stack",
    "PfeifferConfig": "finetune.adapters.pfeiffer",
    "DataConfig": "finetune.data.config",
    "Task": "finetune.model.task",
    "TrainConfig": "finetune.training.config",
    "UserError": "finetune.errors",
}
__all__ = sorted(_PUBLIC)


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


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


sys.modules[__name__].__class__ = _Package

"""Norm tuning: the factors and offsets of a model's norms train, and nothing else.

Zhao et al. 2023 (arXiv:2312.11420) show how far layer norms alone can move a model; PEFT has it as LN tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from finetune.adapters import peft_format
from finetune.adapters.base import ADAPTERS
from finetune.adapters.full_copy import saved_whole
from finetune.adapters.peft_modules import read_saved, written
from finetune.adapters.select import SelectAdapter
from finetune.adapters.targets import matches
from finetune.adapters.weight import WeightConfig
from finetune.errors import ConfigError, ModelError, nearest
from finetune.structure import inspect
from finetune.structure.norms import norms

METHOD = "LN_TUNING"
"""PEFT's name."""
ALL_NORMS = "all-norms"


@dataclass
class NormTuningConfig(WeightConfig):
    """Norm tuning. With `path`, the saved adapter decides targets and train_also.

    Attributes:
        targets: `all-norms`, or a list of names and globs of norms, each of which must match something.
    """

    target_words: ClassVar[tuple[str, ...]] = (ALL_NORMS,)

    name: str = "norm_tuning"
    learning_rate: float = 0.016
    targets: Any = ALL_NORMS

    def check_saved(self, directory: Path) -> None:
        """Refuse another method and settings that we do not compute."""
        read_saved(directory, METHOD)


class NormTuningAdapter(SelectAdapter):
    """Norm tuning attached to a model; see `NormTuningConfig`."""

    def check_settings(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """There are none that the names of the tensors do not tell."""
        read_saved(directory, METHOD)

    def file_keys(self) -> dict[str, nn.Parameter]:
        """PEFT's names."""
        return {
            f"{peft_format.PREFIX}{name}.{'ln_tuning_layers.' if name in self.parts else ''}{leaf}": parameter
            for name, module in self.copies.items()
            for leaf, parameter in module.trains()
        }

    def file_config(self) -> dict[str, Any]:
        """adapter_config.json as stock PEFT reads it."""
        whole = [name for name in self.copies if name not in self.parts]
        lists = {"target_modules": peft_format.shorten(self.parts, self.names), "modules_to_save": whole}
        return written(METHOD, lists, peft_format.base_of(self.model), peft_format.task_type(self.structure))


@ADAPTERS.register(NormTuningConfig)
def build(config: NormTuningConfig, model: nn.Module) -> NormTuningAdapter:
    """Attach norm tuning to a model; `config.path` decides the structure here, its tensors are loaded by `attach`."""
    found = norms(model)
    if config.path is not None:
        saved = read_saved(Path(config.path), METHOD)
        targets = [name for name in found if saved.adapts(name)]
        others = [n for n, _ in model.named_modules() if n and n not in found and saved.adapts(n)]
        if others or not targets:
            reason = f"also adapts {others[0]}, which is no norm" if others else f"adapts {saved.target_modules}"
            raise ModelError(f"adapter {config.path} {reason}: expected norms, such as {', '.join([*found][-2:])}")
        whole = saved_whole(model, inspect(model), saved.modules_to_save)
        config = replace(config, targets=targets, train_also=whole)
    return NormTuningAdapter(config, model, [], _chosen(config, found))


def _chosen(config: NormTuningConfig, found: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    if config.targets == ALL_NORMS:
        if not found:
            raise ConfigError("adapter=norm_tuning: the model has no norms with factors that could train")
        return found
    leaves = sorted({name.rpartition(".")[2] for name in found})
    for pattern in config.targets:
        if not any(matches(pattern, name) for name in found):
            raise ConfigError(
                f"adapter.targets: {pattern!r} matches no norm of the model;"
                f" have {', '.join(leaves)}{nearest(pattern.rpartition('.')[2], leaves)}"
            )
    return {name: parts for name, parts in found.items() if any(matches(pattern, name) for pattern in config.targets)}

"""What PEFT's adapter_config.json says about a LoRA: which projections, of which rank, with which alpha.

Settings that we do not honour are refused by name, also those that a later PEFT will invent.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters import peft_format
from finetune.adapters.lora_besides import NOTHING, Besides
from finetune.adapters.targets import ALL_LINEAR
from finetune.errors import ModelError
from finetune.structure import Projection, Structure, embedding_projection, head_projection, other_projections

UNDERSTOOD = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "modules_to_save",
    "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora", "bias",
    "lora_bias", "trainable_token_indices",
})  # fmt: skip
"""Keys that decide what the adapter computes, and that we read."""

HARMLESS = frozenset({
    "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "corda_config", "eva_config", "loftq_config", "lora_ga_config",
})  # fmt: skip
"""Keys that say nothing about the saved weights: how they were initialised, trained or found. An initialisation that
also changes the base is told by `init_lora_weights`."""

INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", None)
"""Values of `init_lora_weights` that leave the base as it is."""


@dataclass(frozen=True)
class Saved:
    """The part of adapter_config.json that decides what a LoRA computes; names as in PEFT but for r and lora_alpha."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ()
    target_parameters: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    besides: Besides = NOTHING
    settings: dict[str, Any] = field(default_factory=dict)

    def size_of(self, name: str) -> tuple[int, float]:
        """Rank and alpha of a projection."""
        rank = peft_format.by_pattern(self.rank_pattern, name, self.rank)
        alpha = peft_format.by_pattern(self.alpha_pattern, name, self.alpha)
        return int(rank), float(alpha)

    def to_peft(self, base: str | None, fan_in_fan_out: bool, task_type: str | None) -> dict[str, Any]:
        """The content of adapter_config.json.

        Args:
            base: path or hub id of the base.
            fan_in_fan_out: whether the adapted modules are transformers' Conv1D.
            task_type: what the model gives, as PEFT calls it.
        """
        return {
            "peft_type": "LORA",
            "task_type": task_type,
            "base_model_name_or_path": base or None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": _whole(self.alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            **self.besides.to_peft(),
            "fan_in_fan_out": fan_in_fan_out,
            "target_modules": list(self.target_modules),
            "target_parameters": list(self.target_parameters) or None,
            "modules_to_save": list(self.modules_to_save) or None,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": {name: _whole(alpha) for name, alpha in self.alpha_pattern.items()},
        }


def _whole(number: float) -> float:
    """Alpha is an integer in PEFT's own files, and in what reads them."""
    return int(number) if float(number).is_integer() else number


def read_saved(directory: Path, dora: bool = False) -> Saved:
    """Read the adapter_config.json of a LoRA, or of a DoRA.

    Raises:
        ModelError: when it is missing or broken, of another method, or asks for something we do not compute.
    """
    return parse_saved(peft_format.read_config(directory), directory / peft_format.CONFIG, dora)


def parse_saved(config: dict[str, Any], path: Path, dora: bool = False) -> Saved:
    """The settings of a LoRA, or of a DoRA, from the content of an adapter_config.json.

    Raises:
        ModelError: as `read_saved`, naming `path`.
    """
    if peft_format.method_of(config) != "LORA":
        raise ModelError(f"{path} is of method {peft_format.method_of(config)}: expected LORA")
    if bool(config.get("use_dora")) != dora:
        mine, theirs = ("dora", "lora") if dora else ("lora", "dora")
        found = json.dumps(config.get("use_dora"))
        raise ModelError(f"{path} has use_dora={found}, which adapter={mine} does not compute: set adapter={theirs}")
    _refuse_unknown(config, path)
    _check_types(config, path)
    return Saved(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
        dora=dora,
        target_modules=config.get("target_modules") or (),
        target_parameters=config.get("target_parameters") or (),
        modules_to_save=config.get("modules_to_save") or (),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        besides=Besides.read(config, path),
        settings=config,
    )


def _check_types(config: dict[str, Any], path: Path) -> None:
    """A file from elsewhere may hold anything; what we go by must be of the types that PEFT writes."""

    def names(value: Any) -> bool:
        return value is None or (isinstance(value, list) and all(isinstance(name, str) and name for name in value))

    def pattern(value: Any) -> bool:
        return names(value) or (isinstance(value, str) and _compiles(value))

    def lists(value: Any) -> bool:
        return pattern(value) and all(_compiles(one) for one in ([value] if isinstance(value, str) else value or []))

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)

    def rank(value: Any) -> bool:
        return number(value) and isinstance(value, int)

    def layers(value: Any) -> bool:
        many = value if isinstance(value, list) else [value]
        return value is None or all(isinstance(layer, int) and not isinstance(layer, bool) for layer in many)

    def by_name(value: Any, right: Callable[[Any], bool]) -> bool:
        return value is None or (isinstance(value, dict) and all(_compiles(k) and right(v) for k, v in value.items()))

    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "r": (rank, "a rank of at least 1"),
        "lora_alpha": (number, "a number above 0"),
        "target_modules": (pattern, "a list of names or a regular expression"),
        "exclude_modules": (pattern, "a list of names or a regular expression"),
        "target_parameters": (names, "a list of names"),
        "modules_to_save": (names, "a list of names"),
        "layers_to_transform": (layers, "layer numbers"),
        "layers_pattern": (lists, "a list of names or a regular expression"),
        "rank_pattern": (lambda value: by_name(value, rank), "ranks by name"),
        "alpha_pattern": (lambda value: by_name(value, number), "numbers by name"),
    }
    for key, (right, expected) in rules.items():
        if not right(config.get(key)):
            raise ModelError(f"{path}: {key} is {config.get(key)!r}: expected {expected}")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _refuse_unknown(config: dict[str, Any], path: Path) -> None:
    start = config.get("init_lora_weights")
    if isinstance(start, str | bool) and start not in INITIALISATIONS:
        raise ModelError(
            f"{path} sets init_lora_weights={start!r}, which changes the base as well, or how PEFT computes: save it"
            f" from PEFT with path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    for key, value in sorted(config.items()):
        if key in UNDERSTOOD or key in HARMLESS or key == "init_lora_weights":
            continue
        if value not in (None, False, [], {}, 0):
            raise ModelError(f"{path} sets {key}={value!r}, which finetune does not compute: expected a plain LoRA")


def resolve_saved(
    saved: Saved, model: nn.Module, structure: Structure, path: Path
) -> tuple[list[Projection], dict[str, tuple[int, float]]]:
    """The projections of a model that a saved LoRA adapts, and (rank, alpha) of each.

    Raises:
        ModelError: when it adapts none of them.
    """
    outside = (embedding_projection(model, structure), head_projection(model, structure))
    every = [p for p in (outside[0], *structure.projections, outside[1]) if p is not None]
    if saved.target_modules != ALL_LINEAR:
        every += other_projections(model, structure)
    plan = [p for p in every if _adapts(saved, p, outside)]
    if not plan and not saved.modules_to_save:
        names = list(saved.target_modules) if not isinstance(saved.target_modules, str) else [saved.target_modules]
        raise ModelError(
            f"adapter {path} adapts {', '.join([*names, *saved.target_parameters])}, of which this model has nothing:"
            f" have {', '.join(sorted({p.leaf for p in structure.projections}))}"
        )
    return plan, {p.name: saved.size_of(p.name) for p in plan}


def _adapts(saved: Saved, projection: Projection, outside: tuple[Projection | None, ...]) -> bool:
    if projection.kind == "experts":
        return peft_format.ends(projection.name, saved.target_parameters)
    # PEFT lays the factors of a parameter out as it lies in memory; a transposed one's are others than ours.
    if projection.kind == "linear" and peft_format.ends(f"{projection.name}.weight", saved.target_parameters):
        return True
    if saved.target_modules == ALL_LINEAR:
        return projection not in outside
    return peft_format.targeted(projection.name, saved.target_modules, saved.settings)

"""Fewer blocks: those go that change the hidden states least.

Men et al. 2024 (arXiv:2403.03853, "ShortGPT", section 3.1): a block's influence is 1 - E[cos(x, block(x))] over the
tokens of a text. It is seen once, in the model as it is, before the first block goes.

Shape suffixes: N tokens, H hidden features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import ConfigError, ModelError
from finetune.quant.dense import DenseConfig
from finetune.quant.freeze import freeze
from finetune.quant.pruners.base import PRUNERS
from finetune.quant.pruners.cut import Cut, CutConfig, Run, part_of, put
from finetune.quant.pruners.proof import differs
from finetune.quant.pruners.slices import filled
from finetune.structure import inspect
from finetune.structure.depth import cut_config
from finetune.structure.experiments import UNFORESEEN
from finetune.structure.widths import Build

if TYPE_CHECKING:
    from finetune.quant.driver import Driver


@dataclass
class LayersConfig(CutConfig):
    """Settings of cutting whole blocks."""

    name: str = "layers"


class _Nothing(nn.Module):
    """Stands where a block was; hands on the hidden states, in the form in which the block did."""

    def __init__(self, *, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return (hidden,) if self.in_tuple else hidden


@PRUNERS.register(LayersConfig)
class Layers(Cut):
    """Takes whole blocks out."""

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.settings = config

    def plan(self, model: nn.Module, build: Build) -> None:
        self._full, self._build, self.structure = model, build, inspect(model)
        if len(self.structure.stacks) != 1:
            raise ModelError(f"{type(model).__name__} cannot lose layers: it has several stacks of blocks")
        number = len(self.structure.blocks)
        self._gone = part_of(self.settings.sparsity, number)
        if not self._gone:
            raise ConfigError(
                f"pruner.sparsity is {self.settings.sparsity}, which is none of the {number} layers that"
                f" {type(model).__name__} has: "
                + (f"expected {1 / number:.4g} or more" if number > 1 else "there is nothing to cut")
            )
        # Which ones go is seen on text; that some can is seen now.
        self.original, self.config = model.config, cut_config(model, range(number - self._gone), build)

    def begin(self, driver: Driver) -> None:
        if not self.summary.parts:
            self._judge(driver)
        by_name = {part["name"]: part for part in self.summary.parts}
        names = self.structure.blocks
        kept = [number for number, name in enumerate(names) if not by_name[name]["dropped"]]
        self.config = cut_config(self._full, kept, self._build)
        small: Any = self._build(self.config)
        small.config._attn_implementation = driver.model.config._attn_implementation  # type: ignore[union-attr]
        structure = inspect(small)
        freeze(small, DenseConfig(), structure)
        self._names = dict(zip((names[number] for number in kept), structure.blocks, strict=True))
        self._small = small
        self.structure = replace(
            self.structure,
            projections=tuple(p for p in self.structure.projections if p.name.startswith(self._inside())),
        )

    def _inside(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self._names)

    def _judge(self, driver: Driver) -> None:
        """Which blocks go, and in which form a block answers."""
        names = self.structure.blocks
        influence = []
        for name, pairs in zip(names, driver.resident.survey(driver.model, names, driver.batches), strict=True):
            influence.append(_influence(pairs))
            self.told(f"{name}: influence {influence[-1]:.4f}", 1, 1)
        order = sorted(range(len(names)), key=lambda number: influence[number])
        self.summary.parts = [
            {"name": name, "influence": influence[number], "dropped": number in order[: self._gone]}
            for number, name in enumerate(names)
        ]

    def lay_out(self, model: nn.Module, name: str) -> None:
        kept = name in self._names
        put(model, name, self._small.get_submodule(self._names[name]) if kept else _Nothing(in_tuple=False))

    def block(self, driver: Driver, name: str, run: Run) -> None:
        block = driver.model.get_submodule(name)
        self.told(f"{name} {'stays' if name in self._names else 'goes'}", 1, 1)
        if name not in self._names:
            put(driver.model, name, _Nothing(in_tuple=_in_tuple(block, run)))
            return
        why = ""
        try:
            small = filled(self._small.get_submodule(self._names[name]), block, name, {}, {})
            why = differs(name, block, small, (), {}, run)
        except UNFORESEEN as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
        if why:
            raise ModelError(
                f"{type(driver.model).__name__} cannot lose layers: {name} depends on its place: as"
                f" {self._names[name]}, {why}"
            )
        put(driver.model, name, small)

    def finish(self, model: nn.Module) -> dict[str, str]:
        super().finish(model)
        held = {new: model.get_submodule(old) for old, new in self._names.items()}
        owner = self.structure.blocks[0].rpartition(".")[0]
        parent, _, leaf = owner.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.ModuleList(held.values()))
        return {old: new for old, new in self._names.items() if old != new}


@torch.no_grad()
def _influence(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    """1 - the mean cosine of what goes into a block and what comes out."""
    total, tokens = 0.0, 0
    for before, after in pairs:
        cosine_N = functional.cosine_similarity(before.flatten(0, -2).float(), after.flatten(0, -2).float(), dim=-1)
        total, tokens = total + float(cosine_N.sum()), tokens + len(cosine_N)
    return 1 - total / tokens


def _in_tuple(block: nn.Module, run: Run) -> bool:
    """Whether a block returns a tuple."""
    seen: list[bool] = []
    handle = block.register_forward_hook(lambda _module, _args, output: seen.append(isinstance(output, tuple)))
    try:
        next(run(block))
    finally:
        handle.remove()
    return seen[0]

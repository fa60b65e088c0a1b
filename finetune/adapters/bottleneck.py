"""Adapters that sit after a sub-layer, before its residual: h + up(act(down(h))).

Houlsby et al. 2019 (arXiv:1902.00751) section 2.1. `up` starts as zeros, so that the adapted model starts as the base;
`down` is normal with the paper's deviation of 0.01. A bottleneck is not linear, so it never merges.

Where the sub-layer ends in one projection, the bottleneck follows that projection. Stacked experts end in a sum over
experts, which no projection computes: there it follows the whole mixture, the outermost module around the experts that
holds nothing of attention.

Shape suffixes: B leading dimensions, H hidden features, W width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters.adapted import AdaptedWeight, WrappedLinear
from finetune.adapters.mounting import SeenThrough
from finetune.adapters.own_format import as_saved
from finetune.adapters.targets import matches
from finetune.adapters.weight import WeightAdapter, WeightConfig
from finetune.errors import ConfigError, nearest
from finetune.quant.base import FrozenLinear
from finetune.structure import Projection, Structure, inspect
from finetune.structure.flow import Flow, trace
from finetune.structure.norms import norms

AUTO = "auto"
DEVIATION = 1e-2
"""Of the initial weights of `down` (section 3.6: performance is robust up to this and degrades above)."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
STRUCTURAL = ("width", "activation", "norms", "targets", "train_also")
"""Settings that decide which tensors there are and what they mean; a saved adapter brings its own."""
SITES = tuple[list[Projection], dict[str, int]]
"""Projections that end a sub-layer, and modules that are one, with their hidden features."""


@dataclass
class BottleneckConfig(WeightConfig):
    """A bottleneck. With `path`, the saved adapter decides everything but dtype.

    Attributes:
        width: features of the bottleneck.
        activation: relu | gelu | silu | tanh.
        norms: whether the norms train too, as in Houlsby et al.
        targets: `auto` for the sub-layers that the method means, or a list of names and globs of their last modules.
    """

    target_words: ClassVar[tuple[str, ...]] = (AUTO,)
    after_attention: ClassVar[bool] = True
    structural: ClassVar[tuple[str, ...]] = STRUCTURAL

    width: int = 64
    activation: str = "gelu"
    norms: bool = False
    targets: Any = AUTO

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.width, int) or self.width < 1:
            raise ConfigError(f"adapter.width is {self.width}: expected at least 1")
        if self.activation not in ACTIVATIONS:
            near = nearest(str(self.activation), ACTIVATIONS)
            raise ConfigError(f"adapter.activation is {self.activation!r}: expected {' | '.join(ACTIVATIONS)}{near}")
        if not isinstance(self.norms, bool):
            raise ConfigError(f"adapter.norms is {self.norms!r}: expected true or false")

    def check_saved(self, directory: Path) -> None:
        """Refuse another method and broken settings."""
        as_saved(self, directory, self.structural)


class Bottleneck(nn.Module):
    """h + up(act(down(h))); plain parameters, so that nothing takes them for projections of the model."""

    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.down_weight = nn.Parameter(torch.empty(width, hidden).normal_(std=DEVIATION))
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up_weight = nn.Parameter(torch.zeros(hidden, width))
        self.up_bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, h_BH: Tensor) -> Tensor:
        """In the dtype of h."""
        return h_BH + self.change(h_BH)

    def change(self, h_BH: Tensor) -> Tensor:
        """up(act(down(h))), in the dtype of h."""
        down_WH, down_W, up_HW, up_H = (
            p.to(h_BH.dtype) for p in (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        )
        return F.linear(self.act(F.linear(h_BH, down_WH, down_W)), up_HW, up_H)


class BottleneckLinear(WrappedLinear):
    """A projection that ends a sub-layer, and the bottleneck after it."""

    over: ClassVar[bool] = True

    def __init__(self, base: FrozenLinear, bottleneck: Bottleneck) -> None:
        super().__init__(base)
        self.bottleneck = bottleneck

    def adapted(self, x_BI: Tensor) -> Tensor:
        """y_BH: the sub-layer's output through the bottleneck."""
        y_BH: Tensor = self.bottleneck(self.base(x_BI))
        return y_BH


class BottleneckModule(SeenThrough, AdaptedWeight):
    """A module that ends a sub-layer, such as a mixture of experts, and the bottleneck after it."""

    over: ClassVar[bool] = True

    def __init__(self, base: nn.Module, bottleneck: Bottleneck) -> None:
        nn.Module.__init__(self)
        self.base, self.bottleneck, self.enabled = base, bottleneck, True  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, or the first of its outputs, through the bottleneck."""
        output = self.base(*args, **kwargs)
        if not self.enabled:
            return output
        if isinstance(output, tuple):
            return (self.bottleneck(output[0]), *output[1:])
        return self.bottleneck(output)


class BottleneckAdapter(WeightAdapter):
    """Bottlenecks attached to a model; see `BottleneckConfig`.

    Args:
        plan: projections that are followed by one.
        modules: further modules that are, and their hidden features.
    """

    config: BottleneckConfig

    def __init__(
        self, config: BottleneckConfig, model: nn.Module, plan: list[Projection], modules: Mapping[str, int]
    ) -> None:
        self.modules = dict(modules)
        super().__init__(config, model, plan)

    def wrap(self, base: FrozenLinear, projection: Projection) -> BottleneckLinear:
        """A bottleneck after a projection."""
        return BottleneckLinear(base, self._bottleneck(base.out_features))

    def further(self) -> dict[str, AdaptedWeight]:
        """A bottleneck after each mixture of experts."""
        return {
            name: BottleneckModule(self.model.get_submodule(name), self._bottleneck(hidden))
            for name, hidden in self.modules.items()
        }

    def _bottleneck(self, hidden: int) -> Bottleneck:
        return Bottleneck(hidden, self.config.width, self.config.activation)

    def select(self) -> dict[str, tuple[str, ...]]:
        """The norms, where they train."""
        return norms(self.model) if self.config.norms else {}

    @property
    def mergeable(self) -> bool:
        """Never."""
        return False

    @property
    def obstacle(self) -> str:
        """Why not."""
        return "what follows a sub-layer through an activation is no weight of it"

    def file_config(self) -> dict[str, Any]:
        """Our own; `targets` names what is followed, so that any base finds the same."""
        selected = self.select()
        whole = [name for name in self.copies if name not in selected]
        return super().file_config() | {"targets": [*self.adapted], "train_also": whole}


def attach_bottlenecks(config: BottleneckConfig, model: nn.Module) -> BottleneckAdapter:
    """Attach bottlenecks to a model; `config.path` decides the structure here, its tensors are loaded by `attach`."""
    if config.path is not None:
        config = as_saved(config, Path(config.path), config.structural)
    return BottleneckAdapter(config, model, *chosen_sites(config, understood(config, model), inspect(model)))


def understood(config: BottleneckConfig, model: nn.Module) -> Flow:
    """What the projections of a model are for.

    Raises:
        ConfigError: where that cannot be told.
    """
    flow = trace(model)
    if flow is None:
        raise ConfigError(
            f"adapter={config.name}: this model's sub-layers are not understood, so nothing can follow them"
        )
    return flow


def chosen_sites(config: BottleneckConfig, flow: Flow, structure: Structure) -> SITES:
    """The sub-layers that `config` means.

    Raises:
        ConfigError: for a pattern that matches none of their ends.
    """
    plan, modules = sites(flow, structure, config.after_attention)
    if config.targets != AUTO:
        names = [*(p.name for p in plan), *modules]
        for pattern in config.targets:
            if not any(matches(pattern, name) for name in names):
                leaves = sorted({name.rpartition(".")[2] for name in names})
                raise ConfigError(
                    f"adapter.targets: {pattern!r} ends no sub-layer that adapter={config.name} can follow;"
                    f" have {', '.join(leaves)}{nearest(pattern.rpartition('.')[2], leaves)}"
                )
        plan = [p for p in plan if any(matches(pattern, p.name) for pattern in config.targets)]
        modules = {n: h for n, h in modules.items() if any(matches(pattern, n) for pattern in config.targets)}
    return plan, modules


def sites(flow: Flow, structure: Structure, after_attention: bool) -> SITES:
    """Where sub-layers end.

    Args:
        after_attention: whether attention counts, beside feed-forwards.
    """
    attention = (*flow.key_value, *flow.attention_output)
    modules: dict[str, int] = {}
    for p in structure.projections:
        if p.kind == "experts" and p.name in flow.feedforward_output and p.block is not None:
            modules[_around(p.name, structure.blocks[p.block], attention)] = p.out_features
    ends = {*flow.feedforward_output, *(flow.attention_output if after_attention else ())}
    covered = tuple(f"{name}." for name in modules)
    return [p for p in structure.projections if p.name in ends and not p.name.startswith(covered)], modules


def _around(name: str, block: str, attention: tuple[str, ...]) -> str:
    """The outermost module of a block around one of its parameters that holds nothing of attention."""
    path = block
    for part in name.removeprefix(f"{block}.").split(".")[:-1]:
        path = f"{path}.{part}"
        if not any(other.startswith(f"{path}.") for other in attention):
            break
    return path

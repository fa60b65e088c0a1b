"""Parallel: a bottleneck beside the feed-forward of every block, y + s up(act(down(x))).

He et al. 2022 (arXiv:2110.04366) sections 3.3 and 4.6, "scaled parallel adapter": it reads what the feed-forward reads,
that is, what comes out of the norm where norms come first, and its output is added to the feed-forward's before the
residual. As in the authors' code s = 4, and `down` and `up` start as the factors of LoRA do.

Where a feed-forward is not a module of its own (OPT, BERT), its input is taken where its first projection reads it.

Shape suffixes: B leading dimensions, H hidden features, I in features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from finetune.adapters.adapted import AdaptedWeight
from finetune.adapters.base import ADAPTERS
from finetune.adapters.bottleneck import (
    SITES,
    STRUCTURAL,
    Bottleneck,
    BottleneckAdapter,
    BottleneckConfig,
    BottleneckLinear,
    BottleneckModule,
    chosen_sites,
    understood,
)
from finetune.adapters.mounting import SeenThrough
from finetune.adapters.own_format import as_saved
from finetune.errors import ConfigError
from finetune.quant.base import FrozenLinear
from finetune.structure import Projection, inspect


@dataclass
class ParallelConfig(BottleneckConfig):
    """Scaled parallel adapters.

    Attributes:
        scale: factor on the bottleneck's output.
    """

    after_attention: ClassVar[bool] = False
    structural: ClassVar[tuple[str, ...]] = (*STRUCTURAL, "scale")

    name: str = "parallel"
    learning_rate: float = 0.002
    activation: str = "relu"
    scale: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ConfigError(f"adapter.scale is {self.scale}: expected more than 0")


class ScaledBottleneck(Bottleneck):
    """s up(act(down(x)))."""

    def __init__(self, hidden: int, width: int, activation: str, scale: float) -> None:
        super().__init__(hidden, width, activation)
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        self.scale = scale

    def forward(self, h_BH: Tensor) -> Tensor:
        """In the dtype of h."""
        return self.scale * self.change(h_BH)


@dataclass(eq=False)
class Passage:
    """Hands the input of a feed-forward on from its first projection to its last."""

    x_BH: Tensor | None = None

    def take(self) -> Tensor:
        """What came in; it is let go of here, so that it does not outlive the feed-forward."""
        assert self.x_BH is not None, "a feed-forward ended that had not begun"
        x_BH, self.x_BH = self.x_BH, None
        return x_BH


class Entrance(SeenThrough, AdaptedWeight):
    """The first projection of a feed-forward, which notes what it reads."""

    over: ClassVar[bool] = True

    def __init__(self, base: nn.Module, passage: Passage) -> None:
        super().__init__(base)  # type: ignore[arg-type]
        self.passage = passage

    def forward(self, x_BI: Tensor) -> Tensor:
        """The projection's own output."""
        if self.enabled:
            self.passage.x_BH = x_BI
        y_BO: Tensor = self.base(x_BI)
        return y_BO


class ParallelLinear(BottleneckLinear):
    """The last projection of a feed-forward, and the bottleneck beside the whole of it."""

    def __init__(self, base: FrozenLinear, bottleneck: Bottleneck, passage: Passage) -> None:
        super().__init__(base, bottleneck)
        self.passage = passage

    def adapted(self, x_BI: Tensor) -> Tensor:
        """y_BH: the feed-forward's output, and the bottleneck's."""
        y_BH = self.base(x_BI)
        change_BH: Tensor = self.bottleneck(self.passage.take().to(y_BH.dtype))
        return y_BH + change_BH.view_as(y_BH)


class ParallelModule(BottleneckModule):
    """A mixture of experts, and the bottleneck beside it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, or the first of its outputs, and the bottleneck's."""
        output = self.base(*args, **kwargs)
        if not self.enabled:
            return output
        x_BH = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        y_BH = output[0] if isinstance(output, tuple) else output
        y_BH = y_BH + self.bottleneck(x_BH).view_as(y_BH)
        return (y_BH, *output[1:]) if isinstance(output, tuple) else y_BH


class ParallelAdapter(BottleneckAdapter):
    """Parallel adapters attached to a model; see `ParallelConfig`.

    Args:
        sites: the feed-forwards, by what ends them.
        beginnings: by the name of a projection that ends one, a projection that it begins with.
    """

    config: ParallelConfig

    def __init__(self, config: ParallelConfig, model: nn.Module, sites: SITES, beginnings: dict[str, str]) -> None:
        self.beginnings = {p.name: beginnings[p.name] for p in sites[0]}
        self.passages = {name: Passage() for name in self.beginnings}
        super().__init__(config, model, *sites)

    def wrap(self, base: FrozenLinear, projection: Projection) -> ParallelLinear:
        """The end of a feed-forward."""
        return ParallelLinear(base, self._bottleneck(base.out_features), self.passages[projection.name])

    def further(self) -> dict[str, AdaptedWeight]:
        """The beginnings of feed-forwards, and each mixture of experts."""
        mixtures: dict[str, AdaptedWeight] = {
            name: ParallelModule(self.model.get_submodule(name), self._bottleneck(hidden))
            for name, hidden in self.modules.items()
        }
        return mixtures | {
            first: Entrance(self.model.get_submodule(first), self.passages[last])
            for last, first in self.beginnings.items()
        }

    def _bottleneck(self, hidden: int) -> Bottleneck:
        return ScaledBottleneck(hidden, self.config.width, self.config.activation, self.config.scale)

    @property
    def obstacle(self) -> str:
        """Why it never merges."""
        return "what runs beside a feed-forward through an activation is no weight of it"

    def file_config(self) -> dict[str, Any]:
        """Our own; `targets` names what ends the feed-forwards, so that any base finds the same."""
        return super().file_config() | {"targets": [*self.beginnings, *self.modules]}


@ADAPTERS.register(ParallelConfig)
def build(config: ParallelConfig, model: nn.Module) -> ParallelAdapter:
    """Attach parallel adapters to a model; `config.path` decides the structure here.

    Raises:
        ConfigError: for a model whose feed-forwards are not understood, and patterns that end none.
    """
    if config.path is not None:
        config = as_saved(config, Path(config.path), config.structural)
    flow, structure = understood(config, model), inspect(model)
    sites = chosen_sites(config, flow, structure)
    # Where a gate and what it gates are two projections, both read the same.
    beginnings = {last: first[0] for last, first in flow.feedforward_input.items() if first}
    headless = [p.name for p in sites[0] if p.name not in beginnings]
    if headless:
        raise ConfigError(
            f"adapter={config.name}: where the feed-forward that ends in {headless[0]} begins is not seen"
        )
    return ParallelAdapter(config, model, sites, beginnings)

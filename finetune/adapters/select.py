"""Adapters that train what a model has already: some of its vectors, and nothing beside them.

A method of this kind says which biases of projections train and which modules train some of their own parameters;
freezing, disabling, saving, loading and merging are those of every adapter (weight.py). The stored values stay as they
are: copies in float32 train.

Shape suffixes: B leading dimensions, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters.adapted import WrappedLinear
from finetune.adapters.weight import WeightAdapter, WeightConfig
from finetune.quant.base import FrozenLinear
from finetune.structure import Projection


class BiasLinear(WrappedLinear):
    """A frozen linear layer whose bias trains; one without gets zeros.

    Attributes:
        trained_bias: the bias that takes the place of the base's.
    """

    over: ClassVar[bool] = True

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__(base)
        given = base.bias
        start = torch.zeros(base.out_features) if given is None else given.detach().float().clone()
        self.trained_bias = nn.Parameter(start)

    def adapted(self, x_BI: Tensor) -> Tensor:
        """The base's product, moved by what the bias has learnt: at the start by nothing, bit for bit."""
        y_BO = self.base(x_BI)
        learnt_O = self.trained_bias if self.bias is None else self.trained_bias - self.bias.to(self.trained_bias.dtype)
        return y_BO + learnt_O.to(y_BO.dtype)

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The bias alone: what stores the weight keeps its codes, unless an adapter under this one changes it."""
        changed = self.below()
        learnt = self.trained_bias.detach().to(torch.float32, copy=True)
        if "bias" in changed:
            learnt += changed["bias"] if self.bias is None else changed["bias"] - self.bias.float()
        yield from (changed | {"bias": learnt}).items()


class SelectAdapter(WeightAdapter):
    """Trains biases of projections and parameters of further modules.

    Args:
        plan: projections whose bias trains.
        parts: further modules by name, each with the names of those of its parameters that train.
    """

    def __init__(
        self, config: WeightConfig, model: nn.Module, plan: list[Projection], parts: Mapping[str, tuple[str, ...]]
    ) -> None:
        self.parts = dict(parts)
        super().__init__(config, model, plan)

    def select(self) -> dict[str, tuple[str, ...]]:
        """The further modules."""
        return self.parts

    def wrap(self, base: FrozenLinear, projection: Projection) -> BiasLinear:
        """A bias that trains."""
        return BiasLinear(base)

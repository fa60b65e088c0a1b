"""What stands in a model for a frozen weight and what trains beside it: a linear layer, a stack of experts, or another.

Shape suffixes: B leading dimensions, O out features, I in features, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters.mounting import Mounted
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight


class AdaptedWeight(Mounted, ABC):
    """A frozen weight and what trains beside it. Everything but `base` is trainable.

    Args:
        base: the frozen weight, in whatever storage format.
    """

    under: ClassVar[bool] = True

    def __init__(self, base: FrozenWeight) -> None:
        super().__init__()
        self.base = base
        self.enabled = True
        self.in_features, self.out_features = base.in_features, base.out_features

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The stored weight of the base, without what was trained."""
        return self.base.dequantize(dtype)  # type: ignore[operator]

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """What training has changed of the base, by its name there and in float32; nothing where it changed nothing."""
        return iter(self.below().items())

    def pruned_base(self) -> Any:
        """The frozen weight beneath all that is mounted here, where its zeros are to stay; else None."""
        base = self.base
        while isinstance(base, AdaptedWeight):
            base = base.base
        return base if isinstance(base, FrozenWeight) and base.pruned else None

    def kept(self) -> Tensor | None:
        """Where weights may be other than zero, bool, as `base.dequantize` lays them out; None where all may."""
        pruned = self.pruned_base()
        return None if pruned is None else ~pruned.cleared()

    def below(self) -> dict[str, Tensor]:
        """The same of what another adapter has put under this one; empty where this one stands on the base itself."""
        return dict(self.base.merged()) if isinstance(self.base, AdaptedWeight) else {}


class FoldedWeight(AdaptedWeight):
    """A frozen weight that what trains beside it can be folded into."""

    @abstractmethod
    def merge(self, weight: Tensor) -> Tensor:
        """The weight (float32, as `base.dequantize` lays it out: w_OI, or a stack) with what was trained folded in."""

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The weight as `merge` gives it, zero where a pruned one is; a method may change the bias as well."""
        below = self.below()
        weight = below.pop("weight", None)
        merged, kept = self.merge(self.dequantize(torch.float32) if weight is None else weight), self.kept()
        yield "weight", merged if kept is None else torch.where(kept, merged, 0)
        yield from below.items()


class WrappedLinear(AdaptedWeight):
    """A frozen linear layer and what trains beside it. With its initial values it must give the base's own bits."""

    base: FrozenLinear

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__(base)
        self.transposed = bool(getattr(base, "transposed", False))

    @property
    def bias(self) -> nn.Parameter | None:
        """The frozen bias."""
        return self.base.bias

    @property
    def weight(self) -> Tensor:
        """What the base calls so; some models look at the dtype of a weight before they call its module (T5)."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x_BI: Tensor) -> Tensor:
        """y_BO: the base's own while disabled."""
        return self.adapted(x_BI) if self.enabled else self.base(x_BI)

    @abstractmethod
    def adapted(self, x_BI: Tensor) -> Tensor:
        """y_BO in the dtype of `x_BI`; cast trained tensors to that dtype, so that gradients arrive in their own."""


class AdaptedLinear(FoldedWeight, WrappedLinear):
    """A frozen linear layer whose weight takes up what trains beside it: what most methods are made of."""


class AdaptedExperts(FoldedWeight):
    """A frozen stack of experts and what trains beside each; `experts[e]` is how the model reads one."""

    base: FrozenExperts

    def __init__(self, base: FrozenExperts) -> None:
        super().__init__(base)
        self.num_experts = base.num_experts

    def __getitem__(self, expert: int | Tensor) -> Any:
        return self.adapted(expert) if self.enabled else self.base[expert]  # type: ignore[index]

    @abstractmethod
    def adapted(self, expert: int | Tensor) -> Any:
        """What stands for the weight of one expert in `F.linear(x, weight)` and `x @ weight`."""

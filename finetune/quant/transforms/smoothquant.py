"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, section 4): outlier channels move from activations into weights.

With X the inputs of what reads a norm, and W their weights,

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

(equation 4; both maxima at least 1e-5, W over all readers). The norm is divided by s, the columns of all that reads it
are multiplied by s. For formats that round inputs; formats of weights alone gain nothing from it.

Shape suffixes: I in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.quant.dense import DenseExperts
from finetune.quant.transforms.base import TRANSFORMS, Forward, Transform, TransformConfig
from finetune.quant.transforms.fold import fold
from finetune.quant.transforms.search import Scaling
from finetune.quant.transforms.statistics import gather
from finetune.structure.base import Projection

if TYPE_CHECKING:
    from finetune.quant.driver import Driver

LEAST = 1e-5
"""Of both maxima, as in the authors' code."""


@dataclass
class SmoothQuantConfig(TransformConfig):
    """Settings of SmoothQuant.

    Attributes:
        alpha: how much of the difficulty moves into the weights, 0 to 1.
    """

    needs_inputs: ClassVar[bool] = True

    name: str = "smoothquant"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"transform.alpha is {self.alpha}: expected 0 (nothing is asked of the weights) to 1")


@TRANSFORMS.register(SmoothQuantConfig)
class SmoothQuant(Transform):
    """Scales what norms put out."""

    def __init__(self, config: SmoothQuantConfig | None = None) -> None:
        super().__init__()
        self.config = config or SmoothQuantConfig()

    @torch.no_grad()
    def block(self, driver: Driver, projections: list[Projection], forward: Forward) -> None:
        by_name = {p.name: p for p in driver.structure.projections}
        for scaling in self.scalings(driver, projections, forward):
            if not scaling.is_norm:
                continue
            largest_I = gather(driver.model, scaling, by_name, forward, grams=False).largest()
            if largest_I is None:
                continue
            alpha = self.config.alpha
            columns_I = _columns(driver, scaling, by_name.keys()).clamp(min=LEAST)
            by_I = largest_I.clamp(min=LEAST).pow(alpha) / columns_I.pow(1 - alpha)
            fold(driver.model, scaling, by_I)
            figures = {
                "largest_input": float(largest_I.max()),
                "largest_input_smoothed": float((largest_I / by_I).max()),
            }
            self.summary.folded[scaling.source] = figures


def _columns(driver: Driver, scaling: Scaling, projections: Any) -> Tensor:
    """max|W_j| over all projections that read a tensor, [I]; routers, which are not quantized, do not count."""
    found = []
    for name in scaling.readers:
        module: Any = driver.model.get_submodule(name)
        if name in projections:
            rows = -1 if module.transposed else -2
            largest = module.weight.float().abs().amax(rows)
            found.append(largest.amax(0) if isinstance(module, DenseExperts) else largest)
    return torch.stack(found).amax(0)

"""Gamma migration of Outlier Suppression (Wei et al. 2022, arXiv:2209.13325, section 4.1).

A norm's factor gamma makes outliers of channels that are none before it. It moves into the columns of all that read
the norm: the norm then multiplies by 1 and adds beta / gamma. A norm whose output is a residual, too (post-norm BERT),
stays as it is: the paper multiplies that branch by gamma in a module of its own, for which a plain checkpoint has no
place. Channels whose gamma is 0 stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from finetune.quant.transforms.base import TRANSFORMS, Forward, Transform, TransformConfig
from finetune.quant.transforms.fold import fold
from finetune.structure.base import Projection

if TYPE_CHECKING:
    from finetune.quant.driver import Driver


@dataclass
class GammaConfig(TransformConfig):
    """No settings. Data is needed to see what reads a norm."""

    needs_inputs: ClassVar[bool] = True

    name: str = "gamma"


@TRANSFORMS.register(GammaConfig)
class Gamma(Transform):
    """Makes the factors of norms 1."""

    def __init__(self, config: GammaConfig | None = None) -> None:
        super().__init__()
        self.config = config or GammaConfig()

    @torch.no_grad()
    def block(self, driver: Driver, projections: list[Projection], forward: Forward) -> None:
        for scaling in self.scalings(driver, projections, forward):
            if scaling.is_norm:
                norm: Any = driver.model.get_submodule(scaling.source)
                gamma_I = norm.weight.float() + scaling.offset
                fold(driver.model, scaling, gamma_I)
                largest, smallest = float(gamma_I.abs().max()), float(gamma_I.abs().min())
                self.summary.folded[scaling.source] = {"largest": largest, "smallest": smallest}

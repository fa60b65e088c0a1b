"""QAT of scales only: the integers of the base stay, their scales (and real zero points) train.

PEQA (Kim et al. 2023, arXiv:2305.14152), section 3.2: `W = q (s0 + ds)` with the codes q frozen. Here the change is a
share of the scale, `s = s0 (1 + t)`, so that a rate means the same in every layer; scales are numbers of bfloat16,
which every checkpoint holds as they are. It merges into the base's own codes with other scales, and nothing is rounded.

Shape suffixes: B leading dimensions, O out features, I in features, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters.adapted import AdaptedExperts, AdaptedLinear
from finetune.adapters.base import ADAPTERS
from finetune.adapters.integers import IntegerAdapter, check_base, split_plan
from finetune.adapters.learnt_grid import ComputedWeight, LearntGrid
from finetune.adapters.own_format import as_saved
from finetune.adapters.weight import WeightConfig, choose
from finetune.kernels import affine
from finetune.kernels.computed_linear import computed_linear
from finetune.kernels.fake_affine import decode_steps, grouped
from finetune.quant.affine_grid import AffineGrid
from finetune.quant.affine_storage import Affine, AffineConfig, Stored
from finetune.quant.base import FrozenExperts, FrozenLinear, QuantConfig
from finetune.structure import Projection, inspect


@dataclass
class QATScalesConfig(WeightConfig):
    """Scales of a base that is stored in integers. With `path`, the saved adapter decides targets and train_also.

    A scale moves by a share of itself, so that its rate does not fall with the width of the base.
    """

    by_width: ClassVar[bool] = False

    name: str = "qat_scales"
    learning_rate: float = 1e-2

    def check_saved(self, directory: Path) -> None:
        """Refuse another method and broken settings."""
        as_saved(self, directory, ("targets", "train_also"))

    def check_base(self, quant: QuantConfig) -> None:
        """Refuse a storage that has no integers."""
        check_base(self.name, quant, dense=False)


class LearntScales(LearntGrid):
    """A frozen weight in integers whose scales train."""

    base: Any

    def start(self) -> tuple[Tensor, Tensor | None]:
        """Those of the base; without weights it may not be stored in integers yet."""
        if not isinstance(self.base, Affine):
            return torch.ones(self.out_features, 1, device="meta"), None
        return super().start()

    def decoded(self, codes_OP: Tensor, zero_OG: Tensor | None, expert: Any, *learnt: Tensor) -> Tensor:
        """w_OI in float32, with a gradient to what trains.

        Args:
            codes_OP: packed.
            zero_OG: of the base, beside these codes.
            expert: which part of the grid they belong to.
        """
        scale_OG, moved_OG = self.moved(learnt, expert)
        codes_OI = affine.unpack(codes_OP, self.base.bits, self.in_features).float()
        code_OGS = grouped(codes_OI, self.base.group_size)
        if zero_OG is None:
            code_OGS = code_OGS - 2 ** (self.base.bits - 1)
        elif not zero_OG.is_floating_point():
            code_OGS = code_OGS - zero_OG[..., None].float()
        return decode_steps(code_OGS, scale_OG, moved_OG, self.in_features)

    def weight_of(self, expert: Any, *learnt: Tensor) -> Tensor:
        """w_OI of one expert, or of all there is (`...`)."""
        zero = self.base.zero
        return self.decoded(self.base.weight[expert], None if zero is None else zero[expert], expert, *learnt)

    def merge_into_codes(self) -> Affine:
        """The codes of the base with these scales."""
        base: Affine = self.base
        scale_OG, zero_OG = self.moved(self.learnt())
        grid = AffineGrid(scale_OG, zero_OG, base.bits, base.group_size).narrowed()
        frozen: Affine = self.base.like(base.settings())
        frozen.hold(Stored(base.weight, grid.scale_OG, grid.zero_OG))
        return frozen


class ScalesLinear(LearntScales, AdaptedLinear):
    """A linear layer in integers whose scales train."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__(base)
        self.begin_grid(True)

    def adapted(self, x_BI: Tensor) -> Tensor:
        """x times the weight, in the dtype of x."""
        return computed_linear(x_BI, self.bias, partial(self.weight_of, ...), *self.learnt())

    def merge(self, weight: Tensor) -> Tensor:
        """What the codes stand for now, in float32; what they stood for has no part in it."""
        return self.weight_of(..., *self.learnt()).detach()


class ScalesExperts(LearntScales, AdaptedExperts):
    """A stack of experts in integers whose scales train."""

    def __init__(self, base: FrozenExperts, *, transposed: bool) -> None:
        super().__init__(base)
        self.transposed = transposed
        self.begin_grid(True)

    def adapted(self, expert: int | Tensor) -> Any:
        """The weight of one expert, computed where it is used."""
        index = int(expert)
        return ComputedWeight(partial(self.weight_of, index), self.learnt(index), self.base.dtype, self.transposed)

    def merge(self, weight: Tensor) -> Tensor:
        """What the codes stand for now, in float32 and the layout of memory."""
        w_EOI = self.weight_of(..., *self.learnt()).detach()
        return w_EOI.mT.contiguous() if self.transposed else w_EOI


class QATScalesAdapter(IntegerAdapter):
    """Scales of a base attached for training; see `QATScalesConfig`."""

    config: QATScalesConfig
    adapted: dict[str, Any]

    def __init__(self, config: QATScalesConfig, model: nn.Module) -> None:
        """What the base keeps in another storage is left out, unless it was named.

        Raises:
            ConfigError: where nothing is stored in integers, or something named is not.
        """
        plan = choose(model, inspect(model), config)
        plan, self.left_out = split_plan(config, model, plan, dense=False)
        super().__init__(config, model, plan)

    def wrap(self, base: FrozenLinear, projection: Projection) -> ScalesLinear:
        """Integers whose scales train."""
        return ScalesLinear(base)

    def wrap_experts(self, base: FrozenExperts, projection: Projection) -> ScalesExperts:
        """The same for a stack."""
        return ScalesExperts(base, transposed=projection.transposed)

    @property
    def starts_as_base(self) -> bool:
        """The scales of the base are rounded to bfloat16."""
        return False

    def merged_settings(self) -> dict[str, AffineConfig]:
        """How the merged weights are stored, by the name of the projection."""
        return {name: module.base.settings() for name, module in self.adapted.items()}


@ADAPTERS.register(QATScalesConfig)
def build(config: QATScalesConfig, model: nn.Module) -> QATScalesAdapter:
    """Attach to a model; `config.path` decides targets here, its tensors are loaded by `attach`."""
    if config.path is not None:
        config = as_saved(config, Path(config.path), ("targets", "train_also"))
    return QATScalesAdapter(config, model)

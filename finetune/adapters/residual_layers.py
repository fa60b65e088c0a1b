"""What stands for a frozen weight whose low-rank product starts from that weight; see residual.py.

Shape suffixes: O out features, I in features, R rank, E experts; `...` a stack of experts or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.adapters.adapted import AdaptedWeight
from finetune.adapters.lora_layers import LoRAExperts, LoRALinear
from finetune.adapters.principal import principal
from finetune.quant.base import FrozenWeight
from finetune.structure import Projection


class Rebased(AdaptedWeight):
    """A frozen weight that a residual one may stand in for.

    Attributes:
        residual: in the storage of the base; None where the base itself computes.
    """

    over: ClassVar[bool] = False  # a residual is one of the stored weight

    residual: FrozenWeight | None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.residual = None

    @property
    def stored(self) -> Any:
        """The frozen weight that the product is added to."""
        return self.base if self.residual is None else self.residual

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """What is stored beneath the product."""
        weight: Tensor = self.stored.dequantize(dtype)
        return weight

    def take(self, residual: FrozenWeight) -> None:
        """Compute with a residual base from now on."""
        self.residual = residual.requires_grad_(False)


class ResidualLinear(Rebased, LoRALinear):
    """A linear layer with a low-rank product beside it, on the base or on a residual one."""

    @staticmethod
    def laid_out(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        """Factors as the parameters hold them."""
        return a_RI, b_OR

    @staticmethod
    def matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `laid_out`, of any rank."""
        return a, b


class ResidualExperts(Rebased, LoRAExperts):
    """A stack of experts with a low-rank product beside each, on the base or on a residual one."""

    def laid_out(self, a_ERI: Tensor, b_EOR: Tensor) -> tuple[Tensor, Tensor]:
        """Factors as the parameters hold them."""
        return a_ERI.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1)

    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `laid_out`, of any rank."""
        count = self.num_experts
        a_ERI, b_ORE = a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count))
        return a_ERI, b_ORE.permute(2, 0, 1)


@dataclass
class Weight:
    """A projection while its start is looked for; weights are float32 [..., O, I] here, whatever memory has.

    Attributes:
        module: what stands for it, its factors not yet filled.
        w_OI: the weight to start from.
        original: whether that is the weight before quantization, not the stored one.
        turned: whether the frozen weight speaks [..., I, O].
        niter: as in `principal`.
    """

    module: ResidualLinear | ResidualExperts
    w_OI: Tensor
    original: bool
    turned: bool
    niter: int | None

    @classmethod
    def of(
        cls,
        module: ResidualLinear | ResidualExperts,
        projection: Projection,
        original: Tensor | None,
        niter: int | None,
    ) -> Weight:
        """Start from the original weight in the layout of its parameter, or from the stored one where that is None."""
        turned = projection.transposed and projection.kind == "experts"
        if original is None:
            w_OI = module.base.dequantize(torch.float32)
            return cls(module, w_OI.mT if turned else w_OI, False, turned, niter)
        weight = original.to(next(module.base.parameters()).device).float()
        return cls(module, weight.mT if projection.transposed else weight, True, turned, niter)

    def decoded(self, frozen: FrozenWeight) -> Tensor:
        """A stored weight."""
        w_OI: Tensor = frozen.dequantize(torch.float32)  # type: ignore[operator]
        return w_OI.mT if self.turned else w_OI

    def quantized(self, w_OI: Tensor) -> FrozenWeight:
        """A weight in the storage of the base."""
        return self.module.base.requantize(w_OI.mT if self.turned else w_OI)

    def factors(self, w_OI: Tensor) -> tuple[Tensor, Tensor]:
        """A and B with s B A near a weight, in float32 but rounded to the dtype in which they train."""
        drawn = torch.Generator().manual_seed(torch.initial_seed())
        kind, rows = self.module.lora_A.weight.dtype, self.module.lora_A.weight.shape[0]
        rank = rows // (w_OI.shape[0] if w_OI.dim() == 3 else 1)
        a_RI, b_OR = principal(w_OI / self.module.scaling, rank, self.niter, drawn)
        return a_RI.to(kind).float(), b_OR.to(kind).float()

    def rest(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """W - s B A."""
        return self.w_OI - self.module.scaling * (b_OR @ a_RI)

    def put(self, a_RI: Tensor, b_OR: Tensor) -> None:
        """Fill the factors of the module."""
        a, b = self.module.laid_out(a_RI, b_OR)
        self.module.lora_A.weight.copy_(a)
        self.module.lora_B.weight.copy_(b)

    def squares(self) -> Tensor:
        """Squared Frobenius norms: of W, of what the base is off it by, of what the adapted module is off it by."""
        merged = self.module.merge(self.module.dequantize(torch.float32))
        off = self.w_OI - self.decoded(self.module.base), self.w_OI - (merged.mT if self.turned else merged)
        return torch.stack([part.square().sum(dtype=torch.float64).cpu() for part in (self.w_OI, *off)])

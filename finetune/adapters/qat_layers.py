"""What quantization-aware training puts in the place of a frozen weight: a sum on an integer grid; see qat.py.

Shape suffixes: B leading dimensions, O out features, I in features, R rank, G groups of a row, E experts; `...` a stack
of experts or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from finetune.adapters.learnt_grid import SCALE_DTYPE, ComputedWeight, LearntGrid
from finetune.adapters.lora_layers import LoRAExperts, LoRALinear
from finetune.kernels import affine
from finetune.kernels.computed_linear import computed_linear
from finetune.kernels.fake_affine import fake_quantize
from finetune.quant.affine_grid import SHRINKS, AffineGrid, clipped_shares
from finetune.quant.affine_storage import Affine, AffineConfig
from finetune.quant.base import QUANTIZERS, FrozenExperts, FrozenLinear

TRIED = SHRINKS[::5]
"""Shares of a group's range that its grid may start from: every fifth of GPTQ's, since training goes on from there."""


@dataclass(frozen=True)
class Target:
    """The integers that a weight is trained for.

    Attributes:
        settings: bits, size of groups and zero points.
        learned: whether steps train; otherwise they are those of the base, or fitted to the range of each group.
        mse: whether the range of a group is that which its weights err least on at the start.
    """

    settings: AffineConfig
    learned: bool
    mse: bool = False

    def fit(self, w_OI: Tensor, shrink_OG: Tensor | None = None) -> AffineGrid:
        """The grid that spans the groups of a weight, or a share of each."""
        settings = self.settings
        return AffineGrid.fit(
            w_OI,
            settings.bits,
            settings.group_size,
            symmetric=settings.symmetric,
            zero_point=settings.zero_point,
            scale_dtype=SCALE_DTYPE,
            shrink_OG=shrink_OG,
            narrow=False,
        )

    def shares(self, w_OI: Tensor) -> Tensor | None:
        """Which share of each group its grid is to span; None for all of it."""
        return clipped_shares(w_OI, partial(self.fit, w_OI), TRIED) if self.mse and not w_OI.is_meta else None


class FakeQuantized(LearntGrid):
    """A frozen weight and what trains beside it, rounded together onto a grid of integers.

    Attributes:
        target: the integers.
        first_scale, first_zero: where the grid of a dense base starts; derived from the base, so they are not saved.
        share: of each group that a fitted grid spans, derived as well; None for all of it.
    """

    first_scale: Tensor | None
    first_zero: Tensor | None
    share: Tensor | None

    def begin(self, target: Target, w_OI: Tensor) -> None:
        """Find the grid.

        Args:
            w_OI: the base in the layout of its codes, float32.
        """
        self.target = target
        stored, share, first = isinstance(self.base, Affine), None, None
        if not stored:
            share = target.shares(w_OI)
            first = target.fit(w_OI, share) if target.learned else None
        derived = {
            "first_scale": None if first is None else first.scale_OG,
            "first_zero": None if first is None else first.zero_OG,
            "share": share if first is None else None,
        }
        for name, tensor in derived.items():
            self.register_buffer(name, tensor, persistent=False)
        self.begin_grid(target.learned)

    def start(self) -> tuple[Tensor, Tensor | None]:
        """Those of the base where it is stored in integers, else what was fitted to it."""
        if self.first_scale is None:
            return super().start()
        return self.first_scale.float(), self.first_zero

    def grid(self, w_OI: Tensor, learnt: Sequence[Tensor], expert: Any = ...) -> AffineGrid:
        """The grid of a weight, with a gradient to what trains of it; scales in float32."""
        settings = self.target.settings
        if self.first_scale is None and not isinstance(self.base, Affine):
            return self.target.fit(w_OI.detach(), None if self.share is None else self.share[expert])
        return AffineGrid(*self.moved(learnt, expert), settings.bits, settings.group_size)

    def rounded(self, w_OI: Tensor, learnt: Sequence[Tensor], expert: Any = ...) -> Tensor:
        """A weight as the codes nearest to it decode, in float32."""
        grid = self.grid(w_OI, learnt, expert)
        return fake_quantize(w_OI, grid.scale_OG, grid.zero_OG, grid.bits, grid.group_size)

    def in_codes(self, w_OI: Tensor) -> Affine:
        """A frozen module, to stand where the base does, whose codes decode to `rounded(w_OI)` bit for bit."""
        grid = self.grid(w_OI, self.learnt()).narrowed()
        frozen = self.empty()
        frozen.take(grid, grid.encode(w_OI))
        return frozen

    def empty(self) -> Affine:
        """A module in place of the base that holds nothing yet."""
        base, settings = self.base, self.target.settings
        if isinstance(base, Affine):
            return cast(Affine, base.like(settings))  # type: ignore[attr-defined]
        like = next(base.parameters())
        common: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "transposed": base.transposed}
        if isinstance(base, FrozenExperts):
            common["experts"] = base.num_experts
        bias = getattr(base, "bias", None)
        frozen: Affine = QUANTIZERS.build(
            settings, base.out_features, base.in_features, **common, **({} if bias is None else {"bias": True})
        )
        if bias is not None:
            frozen.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return frozen

    def summed(self, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """w_OI + s B A in float32, zero where a pruned base is."""
        sum_OI = w_OI + self.scaling * (b_OR.float() @ a_RI.float())  # type: ignore[operator]
        return sum_OI * (w_OI != 0) if self.pruned_base() is not None else sum_OI


class QATLinear(FakeQuantized, LoRALinear):
    """A linear layer that computes with the integers that its sum with a low-rank product rounds to."""

    def __init__(self, base: FrozenLinear, target: Target, **sizes: Any) -> None:
        super().__init__(base, **sizes)
        self._codes: tuple[Any, Any] | None = None
        self.begin(target, base.dequantize(torch.float32))

    def train(self, mode: bool = True) -> Self:
        """Let go of the integers that generation decodes."""
        self._codes = None
        return super().train(mode)

    def adapted(self, x_BI: Tensor) -> Tensor:
        """x times the rounded sum, in the dtype of x."""
        if self.training or torch.is_grad_enabled():
            return computed_linear(x_BI, self.bias, self._weight, *self.factors(), *self.learnt())
        return computed_linear(x_BI, self.bias, self._decoded)

    def _decoded(self) -> Tensor:
        """The same bits, from integers that are kept until what trains is written to: a token need not round anew."""
        state = [(p._version, p.data_ptr()) for p in (*self.factors(), *self.learnt())]
        if self._codes is None or self._codes[0] != state:
            self._codes = (state, self.merge_into_codes())
        kept: Any = self._codes[1]
        w_OI: Tensor = kept.dequantize(torch.float32)
        return w_OI

    def _weight(self, a_RI: Tensor, b_OR: Tensor, *learnt: Tensor) -> Tensor:
        return self.rounded(self.summed(self.base.dequantize(torch.float32), a_RI, b_OR), learnt)

    def merge(self, weight: Tensor) -> Tensor:
        """The rounded sum, in float32."""
        return self.rounded(self.summed(weight, *self.factors()), self.learnt())

    def merge_into_codes(self) -> Affine:
        """The same as the integers themselves."""
        return self.in_codes(self.summed(self.base.dequantize(torch.float32), *self.factors()))


class QATExperts(FakeQuantized, LoRAExperts):
    """A stack of experts that compute with such integers."""

    def __init__(self, base: FrozenExperts, target: Target, **sizes: Any) -> None:
        super().__init__(base, **sizes)
        stack = base.dequantize(torch.float32)
        self.begin(target, stack.mT if self.transposed else stack)

    def adapted(self, expert: int | Tensor) -> Any:
        """The weight of one expert, computed where it is used."""
        base = self.base
        dtype = base.dtype if isinstance(base, Affine) else next(base.parameters()).dtype
        return ComputedWeight(*self.weight_of(expert), dtype, self.transposed)

    def stored_weight(self, expert: int | Tensor) -> Tensor:
        """The base's w_OI of one expert in float32."""
        base: Any = self.base
        if not isinstance(base, Affine):
            w_OI: Tensor = base[expert].float()
            return w_OI.mT if self.transposed else w_OI
        codes, scale, *zero = self.base.expert_operand(int(expert)).tensors  # type: ignore[operator]
        shape = [self.out_features, self.in_features]
        return affine.dequantize_affine(
            codes, scale, zero[0] if zero else None, base.bits, base.group_size, shape, torch.float32
        )

    def weight_of(self, expert: int | Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """What makes the rounded w_OI of one expert, and of what."""

        def weight(a_RI: Tensor, b_OR: Tensor, *learnt: Tensor) -> Tensor:
            return self.rounded(self.summed(self.stored_weight(expert), a_RI, b_OR), learnt, expert)

        return weight, [*self.factors(expert), *self.learnt(expert)]

    def merge(self, weight: Tensor) -> Tensor:
        """The stack of rounded sums, in float32 and the layout of memory."""
        merged = torch.empty_like(weight)
        for expert in range(self.num_experts):
            make, trained = self.weight_of(expert)
            w_OI = make(*trained)
            merged[expert] = w_OI.mT if self.transposed else w_OI
        return merged

    def merge_into_codes(self) -> Affine:
        """The same as the integers themselves."""
        sums = [self.summed(self.stored_weight(e), *self.factors(e)) for e in range(self.num_experts)]
        return self.in_codes(torch.stack(sums))

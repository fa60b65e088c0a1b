"""AWQ (Lin et al. 2023, arXiv:2306.00978, section 3.2): channels with large inputs are rounded on a finer grid.

Weights that meet large inputs matter most. Their columns are multiplied by s before they are rounded, and what they
read is divided by s where it is made: relative to the weight, rounding then errs less there and more elsewhere. With x
the mean magnitude of a channel and u that of its weights (each as a share of the largest of its group, mean over rows),

    s = x^a / u^(1 - a)        s / sqrt(max s * min s)

("duo", as in AutoAWQ and llm-compressor; the paper's own formula is s = x^a). The exponent a is the one of 0, 1/20, ..
19/20 that leaves the least squared error of the outputs of all that read the tensor,
tr((Q(W s)/s - W) H (Q(W s)/s - W)^T), on the very grid on which the weights will be stored; s = 1 where none is better.
Experts that feed experts have factors of their own. Any rounder may follow; where it is rounding to nearest, the range
of each group is searched as well (clip.py).

Shape suffixes: O out features, I in features, U outputs of the source that are read, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from finetune.errors import ConfigError, nearest
from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseExperts, DenseLinear
from finetune.quant.freeze import empty_frozen
from finetune.quant.packed import PackedWeight
from finetune.quant.rounders.base import Rounder, squared
from finetune.quant.rounders.rtn import RTN
from finetune.quant.transforms.base import TRANSFORMS, Forward, Transform, TransformConfig
from finetune.quant.transforms.clip import Clipping, group_of
from finetune.quant.transforms.fold import fold
from finetune.quant.transforms.search import Scaling
from finetune.quant.transforms.statistics import Channels, Statistics, gather
from finetune.structure.base import Projection

if TYPE_CHECKING:
    from finetune.quant.driver import Driver

POINTS = 20
"""Exponents that are tried."""
FORMULAS = ("both", "paper", "duo")
LEAST = 1e-4
"""Of a factor, before all of them are divided by the middle of their range."""


@dataclass
class AWQConfig(TransformConfig):
    """Settings of AWQ.

    Attributes:
        formula: paper (of inputs alone), duo (inputs and the weights' own size), or both: whichever errs less.
        clip: search the range of each group by the error of the output, where codes are rounded to nearest.
    """

    needs_inputs: ClassVar[bool] = True

    name: str = "awq"
    formula: str = "both"
    clip: bool = True

    def __post_init__(self) -> None:
        if self.formula not in FORMULAS:
            known = " | ".join(FORMULAS)
            raise ConfigError(
                f"transform.formula is {self.formula!r}: expected {known}{nearest(self.formula, FORMULAS)}"
            )


@TRANSFORMS.register(AWQConfig)
class AWQ(Transform):
    """Searches the factors of one scaled tensor after the other."""

    def __init__(self, config: AWQConfig | None = None) -> None:
        super().__init__()
        self.config = config or AWQConfig()

    @torch.no_grad()
    def block(self, driver: Driver, projections: list[Projection], forward: Forward) -> None:
        by_name = {p.name: p for p in driver.structure.projections}
        quantized = {p.name for p in projections}
        for scaling in self.scalings(driver, projections, forward):
            readers = [by_name[name] for name in scaling.readers if name in quantized]
            seen = gather(driver.model, scaling, by_name, forward, grams=True) if readers else Statistics()
            trial = _Trial(driver, scaling, readers, seen)
            found = trial.best(self.config.formula) if readers else None
            if found is None:
                continue
            fold(driver.model, scaling, found.by)
            figures = {"exponent": found.exponents, "error": found.error, "error_unscaled": found.error_unscaled}
            self.summary.folded[scaling.source] = figures

    def rounder(self, rounder: Rounder, quant: QuantConfig, grams: Sequence[Tensor | None]) -> Rounder:
        return Clipping(quant, grams) if self.config.clip and isinstance(rounder, RTN) else rounder


class _Reader(NamedTuple):
    """A weight that reads the tensor.

    Attributes:
        weight: as its codes run, float32, [O, I] or [E, O, I].
        module: an empty one of the storage format.
        channels: its inputs, or those of each of its experts.
        dtype: that the weight is held in until it is rounded.
    """

    weight: Tensor
    module: PackedWeight
    channels: list[Channels | None]
    dtype: torch.dtype


class _Found(NamedTuple):
    """The outcome of a search.

    Attributes:
        by: the factors, [I] or [E, I].
        error_unscaled, error: relative squared error of the outputs, without and with them.
        exponents: that were chosen, one or one for each expert; None for 1 throughout.
    """

    by: Tensor
    error_unscaled: float
    error: float
    exponents: list[float | None]


class _Trial:
    """Everything that reads one tensor, rounded with one choice of factors after the other.

    Args:
        readers: those that will be quantized.
        seen: their inputs.
    """

    def __init__(self, driver: Driver, scaling: Scaling, readers: list[Projection], seen: Statistics) -> None:
        self.quant, self.scaling, self.seen = driver.recipe.quant, scaling, seen
        self.by_expert = isinstance(driver.model.get_submodule(scaling.source), DenseExperts)
        self.readers: list[_Reader] = []
        for p in readers:
            dense: Any = driver.model.get_submodule(p.name)
            assert isinstance(dense, DenseLinear | DenseExperts)
            dtype = dense.weight.dtype
            module = empty_frozen(driver.recipe.quant, p, dense, dtype=dtype, device=dense.weight.device)
            assert isinstance(module, PackedWeight)
            driver.prepare(module)
            weight = module.codes_layout(dense.dequantize(torch.float32))
            self.readers.append(_Reader(weight, module, seen.experts.get(p.name, [seen.plain]), dtype))

    def best(self, formula: str) -> _Found | None:
        """The factors that err least; None where none errs less than leaving the tensor as it is."""
        mean = self._means()
        if mean is None:
            return None
        size = self._sizes() if formula != "paper" else mean
        least = unscaled = self._errors(torch.ones_like(mean))
        by, exponents = torch.ones_like(mean), torch.full_like(least, -1.0)
        for exponent in (point / POINTS for point in range(POINTS)):
            paper, duo = mean.pow(exponent), mean.pow(exponent) / (size.pow(1 - exponent) + LEAST)
            for factors in {"paper": (paper,), "duo": (duo,), "both": (paper, duo)}[formula]:
                tried = _normalised(factors)
                errors = self._errors(tried)
                better = errors < least
                least = torch.where(better, errors, least)
                exponents = torch.where(better, torch.full_like(exponents, exponent), exponents)
                by = torch.where(better.unsqueeze(-1) if self.by_expert else better, tried, by)
        if not (exponents >= 0).any():
            return None
        energy = sum(float(_energy(reader.weight, reader.channels).sum()) for reader in self.readers)
        share = 1 / energy if energy > 0 else 0.0
        chosen = [None if value < 0 else value for value in exponents.reshape(-1).tolist()]
        return _Found(by, float(unscaled.sum()) * share, float(least.sum()) * share, chosen)

    def _means(self) -> Tensor | None:
        """x: [I], or [E, I]; channels that come from one output share their mean."""
        if not self.by_expert:
            mean_I = self.seen.mean()
            return None if mean_I is None else self._shared(mean_I)
        stack = next(iter(self.seen.experts.values()))
        # An expert that saw nothing is never better off, so its factors stay 1 whatever is said of its inputs.
        blank = torch.ones_like(self.readers[0].weight[0, 0])
        rows = [blank if c is None or c.total_I is None else c.total_I / c.samples for c in stack]
        return self._shared(torch.stack(rows))

    def _sizes(self) -> Tensor:
        """u: mean over all rows that read a channel of its weights, as shares of the largest of their group."""
        total: Tensor | None = None
        rows = 0
        for reader in self.readers:
            share = _share_of_group(reader.weight.abs(), self.quant)
            share = share if self.by_expert else share.flatten(0, -2)
            total = share.sum(-2) if total is None else total + share.sum(-2)
            rows += share.shape[-2]
        assert total is not None
        return self._shared(total / rows)

    def _shared(self, figure: Tensor) -> Tensor:
        """The mean of a figure over the channels that come from one output."""
        outputs_U, place_I = self.scaling.rows_I.unique(return_inverse=True)
        if len(outputs_U) == len(place_I):
            return figure
        total = figure.new_zeros(*figure.shape[:-1], len(outputs_U)).index_add(-1, place_I, figure)
        return (total / place_I.bincount())[..., place_I]

    def _errors(self, by: Tensor) -> Tensor:
        """The squared error of all readers' outputs, a number, or [E]."""
        total: Tensor | float = 0.0
        spread = by.unsqueeze(-2) if self.by_expert else by
        for weight, module, channels, dtype in self.readers:
            scaled = (weight * spread).to(dtype).float()
            grid = module.fit(scaled)
            rounded = grid.decode(grid.round_columns(scaled, 0))
            errors = _energy(rounded / spread - weight, channels)
            total = total + (errors if self.by_expert else errors.sum())
        assert isinstance(total, Tensor)
        return total


def _normalised(by: Tensor) -> Tensor:
    """Factors divided by the middle of their range."""
    by = by.clamp(min=LEAST)
    by = by / (by.amax(-1, keepdim=True) * by.amin(-1, keepdim=True)).sqrt()
    return torch.where(by.isfinite() & (by > 0), by, 1.0)


def _energy(weight: Tensor, channels: list[Channels | None]) -> Tensor:
    """tr(W H W^T) of each matrix, 0 for one that saw nothing."""
    matrices = [weight] if weight.dim() == 2 else list(weight)
    grams = [None if c is None or c.gram is None else c.gram.matrix_II for c in channels]
    values = [0.0 if h is None else squared(w, h) for w, h in zip(matrices, grams, strict=True)]
    return torch.tensor(values, dtype=torch.float64, device=weight.device)


def _share_of_group(size: Tensor, quant: QuantConfig) -> Tensor:
    """Magnitudes as shares of the largest of their group of columns; of their row where groups do not divide it."""
    group = group_of(quant)
    width = size.shape[-1]
    if group < 1 or width % group:
        group = width
    cut = size.unflatten(-1, (width // group, group))
    return (cut / (cut.amax(-1, keepdim=True) + 1e-6)).flatten(-2)

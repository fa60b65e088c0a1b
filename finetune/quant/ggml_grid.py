"""The grid of llama.cpp's blocks, and the rules by which ggml rounds onto it.

Shape suffixes: O out features (or any leading dimensions), I in features, G blocks of a row, B weights of a block,
C a run of columns, K weights of a row (or of a block) that are kept aside.

The rules are those of `quantize_row_q4_0_ref` and its kin (ggml-quants.c), so that bytes are those of ggml and of the
gguf package: in float32, with the scale as it is before float16 rounds it, although decoding multiplies by the rounded
one.

- q4_0, q5_0: the weight furthest from zero is the code 0 exactly, so d has its sign turned; the other side ends a step
  earlier. q = trunc(w / d + 2^(bits-1) + .5).
- q4_1, q5_1: d = (max - min) / (2^bits - 1); q = trunc((w - min) / d + .5).
- q8_0: d = max|w| / 127; q = w / d, half way away from zero.

`/ d` is a product with 1 / d, which is 0 where d is. So it is here where 1 / d leaves float32 (weights below 1e-37): d
is 0 in float16 by then, and ggml turns what is no number into codes as its compiler happens to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from finetune.kernels import ggml

TENSORS = ("scale_OG", "least_OG", "inverse_OG", "start_OG", "places_OK", "values_OK")


@dataclass(frozen=True)
class GgmlGrid:
    """Where the codes of a weight lie.

    Attributes:
        scale_OG: float16, of either sign.
        least_OG: float16, the value of code 0 of q4_1 and q5_1; else None.
        inverse_OG, start_OG: float32, 1 / d and m as they are before float16 rounds them; what rounding goes by.
        kind: q4_0 | q4_1 | q5_0 | q5_1 | q8_0.
        places_OK, values_OK: of the weights that are kept aside (kernels/ggml.py); None for none. They decode to their
            values whatever their codes.
    """

    scale_OG: Tensor
    least_OG: Tensor | None
    inverse_OG: Tensor
    start_OG: Tensor | None
    kind: str
    places_OK: Tensor | None = None
    values_OK: Tensor | None = None

    @classmethod
    def fit(cls, w_OI: Tensor, kind: str, outliers: int = 0) -> Self:
        """The grid that ggml would choose, with some weights of each block kept aside.

        Those are the furthest from zero. The rest is rounded with the scale that ggml would choose for it alone, or
        with that for the whole block where this errs less. A block that holds NaN or infinity has a scale or a value
        that is not finite either.
        """
        w_OI = w_OI.float()
        short = -w_OI.shape[-1] % ggml.BLOCK
        if short:  # by what is there already, which moves neither end
            w_OI = torch.cat([w_OI, w_OI[..., -1:].expand(*w_OI.shape[:-1], short)], dim=-1)
        w_OGB = w_OI.unflatten(-1, (-1, ggml.BLOCK))
        whole = cls._fit(w_OGB, kind)
        if not outliers:
            return whole
        places_OGK = w_OGB.abs().topk(outliers, dim=-1).indices.sort(dim=-1).values
        nearest_OG1 = w_OGB.gather(-1, w_OGB.abs().argmin(dim=-1, keepdim=True))
        rest_OGB = w_OGB.scatter(-1, places_OGK, nearest_OG1.expand_as(places_OGK))
        grid = cls._fit(rest_OGB, kind).better_than(whole, rest_OGB)
        values_OGK = w_OGB.gather(-1, places_OGK).to(torch.float16)
        return replace(grid, places_OK=places_OGK.to(torch.uint8).flatten(-2), values_OK=values_OGK.flatten(-2))

    @classmethod
    def _fit(cls, w_OGB: Tensor, kind: str) -> Self:
        """The grid that ggml would choose for whole blocks."""
        layout = ggml.LAYOUTS[kind]
        start_OG = w_OGB.amin(dim=-1) if layout.least else None
        if start_OG is not None:
            span_OG, steps = w_OGB.amax(dim=-1) - start_OG, 2 * layout.half - 1
        elif layout.bits == 8:
            span_OG, steps = w_OGB.abs().amax(dim=-1), layout.half - 1
        else:
            furthest_OG1 = w_OGB.abs().argmax(dim=-1, keepdim=True)  # the first of them, whose sign decides
            span_OG, steps = w_OGB.gather(-1, furthest_OG1).squeeze(-1), -layout.half
        # By a tensor on the device: a plain number becomes a product with its reciprocal on CUDA.
        scale_OG = span_OG / torch.tensor(float(steps), device=span_OG.device)
        inverse_OG = scale_OG.reciprocal()
        inverse_OG = torch.where((scale_OG == 0) | inverse_OG.isinf(), 0, inverse_OG)
        least_OG = None if start_OG is None else start_OG.to(torch.float16)
        return cls(scale_OG.to(torch.float16), least_OG, inverse_OG, start_OG, kind)

    def better_than(self, other: Self, w_OGB: Tensor) -> Self:
        """Of two grids of the same blocks the one that errs less, block for block; this one where they err alike."""

        def error(grid: Self) -> Tensor:
            w_OI = w_OGB.flatten(-2)
            error_OI = grid.decode(grid.round_columns(w_OI, 0)) - w_OI
            return error_OI.square().unflatten(-1, (-1, ggml.BLOCK)).sum(dim=-1)

        worse_OG = error(other) < error(self)
        return self.map(lambda mine_OG, others_OG: torch.where(worse_OG, others_OG, mine_OG), other)

    def map(self, change: Callable[..., Tensor], *others: Self) -> Self:
        """The grid with each of its tensors changed, given those of the same name in other grids."""
        changed: dict[str, Any] = {
            name: change(getattr(self, name), *(getattr(other, name) for other in others))
            for name in TENSORS
            if getattr(self, name) is not None
        }
        return replace(self, **changed)

    def part(self, rows: int | slice) -> Self:
        """The grid of some of the leading rows, or of one expert of a stack."""
        return self.map(lambda tensor: tensor[rows])

    def expert(self, number: int) -> Self:
        """The grid of one expert of a stack."""
        return self.part(number)

    @property
    def group(self) -> int | None:
        """Weights of a block."""
        return ggml.BLOCK

    def refit(self, w_OC: Tensor, first: int) -> Self:
        """The grid whose block of columns from `first` on is fitted to these."""
        outliers = 0 if self.places_OK is None else self.places_OK.shape[-1] // self.scale_OG.shape[-1]
        place = first // ggml.BLOCK

        def put(mine: Tensor, new: Tensor) -> Tensor:
            each = new.shape[-1]
            mine = mine.clone()
            mine[:, place * each : (place + 1) * each] = new
            return mine

        return self.map(put, type(self).fit(w_OC, self.kind, outliers))

    def with_expert(self, number: int, part: Self) -> Self:
        """The grid of a stack with another one for one of its experts."""

        def put(mine: Tensor, new: Tensor) -> Tensor:
            mine = mine.clone()
            mine[number] = new
            return mine

        return self.map(put, part)

    def round_columns(self, w_OC: Tensor, first: int) -> Tensor:
        """The codes that ggml gives the columns from `first` on, uint8 [.., O, C]; at the ends those of the ends."""
        layout, count = ggml.LAYOUTS[self.kind], w_OC.shape[-1]
        value_OC = w_OC.float()
        if self.start_OG is not None:
            value_OC = value_OC - ggml.spread(self.start_OG, first, count)
        value_OC = value_OC * ggml.spread(self.inverse_OG, first, count)
        if layout.bits == 8:
            size_OC = value_OC.abs().clamp_(max=layout.half)
            whole_OC = size_OC.floor()
            whole_OC += (2 * (size_OC - whole_OC)).floor_()
            rounded_OC = whole_OC.mul_(value_OC.sign()).clamp_(1 - layout.half, layout.half - 1).add_(layout.half)
        else:
            offset = 0.5 if layout.least else layout.half + 0.5
            rounded_OC = value_OC.add_(offset).trunc_().clamp_(0, 2 * layout.half - 1)
        return rounded_OC.to(torch.uint8)

    def decode(self, codes_OC: Tensor, first: int = 0) -> Tensor:
        """The float32 weights of codes of the columns from `first` on."""
        count = codes_OC.shape[-1]
        least_OC = None if self.least_OG is None else ggml.spread(self.least_OG, first, count)
        decoded_OC = ggml.decode(codes_OC, ggml.spread(self.scale_OG, first, count), least_OC, self.kind)
        if self.places_OK is None or self.values_OK is None:
            return decoded_OC
        aside_OC = self._aside[..., first : first + count]
        return torch.where(aside_OC.isnan(), decoded_OC, aside_OC)

    @cached_property
    def _aside(self) -> Tensor:
        """The values that are kept aside, float32 [.., O, I] up to the end of the last block, NaN elsewhere."""
        assert self.places_OK is not None and self.values_OK is not None
        width = self.scale_OG.shape[-1] * ggml.BLOCK
        dense = torch.full((*self.scale_OG.shape[:-1], width), torch.nan, device=self.scale_OG.device)
        return dense.scatter_(-1, ggml.columns_of(self.places_OK, width), self.values_OK.float())

    def pack(self, codes_OI: Tensor) -> Tensor:
        """Codes of whole rows as blocks, uint8 [.., O, P]."""
        return ggml.pack(codes_OI, self.scale_OG, self.least_OG, self.kind)

"""The grid of affine integer codes: scales and zero points of a weight, and the codes nearest to it.

Shape suffixes: O out features (or any leading dimensions), I in features, G groups of a row, C a run of columns.

A rounder (to nearest here, GPTQ or AWQ over the same object) asks a grid three things: `fit` it to a weight once,
`round_columns` of a weight that it may have moved meanwhile, `decode` codes. Scales are rounded to what is stored
before any code is chosen, so that codes are nearest to what will be decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from finetune.kernels import affine, cpu_integer


@dataclass(frozen=True)
class AffineGrid:
    """Where the codes of a weight lie.

    Attributes:
        scale_OG: float16 where every scale is a normal number there, else float32.
        zero_OG: None (symmetric), uint8 (integer zero points) or float32 (real ones).
        bits: of a code.
        group_size: columns of a row under one scale; -1 for the whole row.
        scale_dtype: a dtype that scales have to survive beside the one they are stored in, for groups fitted anew.
        clipped: search the ranges of groups that are fitted anew.
    """

    scale_OG: Tensor
    zero_OG: Tensor | None
    bits: int
    group_size: int
    scale_dtype: torch.dtype | None = None
    clipped: bool = False

    @classmethod
    def fit(
        cls,
        w_OI: Tensor,
        bits: int,
        group_size: int,
        *,
        symmetric: bool,
        zero_point: str,
        scale_dtype: torch.dtype | None = None,
        shrink_OG: Tensor | None = None,
        narrow: bool = True,
    ) -> Self:
        """The grid that spans each group of a weight, from its least to its largest value.

        - symmetric: scale = 2 max|w| / (2^bits - 1), the code 2^(bits-1) is zero (GPTQ's convention).
        - integer zero points: the span is widened to contain 0, which then is a code exactly.
        - real zero points: the least value is the zero point.

        A group without span gets scale 1, one that holds NaN or infinity a scale that is not finite either.

        Args:
            scale_dtype: a dtype that scales have to survive beside the one they are stored in here.
            shrink_OG: span this share of each group instead, the rest being clipped; None spans all of it.
            narrow: see whether float16 can hold the scales; False leaves them in float32, and does not wait for the
                device that holds the weight.
        """
        least_OG, most_OG = _ends(w_OI.float(), group_size)
        if shrink_OG is not None:
            least_OG, most_OG = least_OG * shrink_OG, most_OG * shrink_OG
        steps = 2**bits - 1
        if symmetric:
            scale_OG = 2 * torch.maximum(-least_OG, most_OG) / steps
        elif zero_point == "real":
            scale_OG = (most_OG - least_OG) / steps
        else:
            least_OG, most_OG = least_OG.clamp(max=0), most_OG.clamp(min=0)
            scale_OG = (most_OG - least_OG) / steps
        scale_OG = torch.where(scale_OG == 0, 1.0, scale_OG)
        if scale_dtype is not None:
            scale_OG = scale_OG.to(scale_dtype).float()
            scale_OG = torch.where(scale_OG == 0, 1.0, scale_OG)
        if narrow:
            scale_OG = _stored(scale_OG)
        zero_OG = None
        if not symmetric and zero_point == "real":
            zero_OG = least_OG
        elif not symmetric:
            zero_OG = (-least_OG / scale_OG.float()).round().clamp(0, steps).to(torch.uint8)
        return cls(scale_OG, zero_OG, bits, group_size, scale_dtype)

    def narrowed(self) -> Self:
        """The grid with its scales as they are stored, where `fit` left them in float32."""
        return replace(self, scale_OG=_stored(self.scale_OG))

    def part(self, rows: int | slice) -> Self:
        """The grid of some of the leading rows, or of one expert of a stack."""
        zero_OG = None if self.zero_OG is None else self.zero_OG[rows]
        return replace(self, scale_OG=self.scale_OG[rows], zero_OG=zero_OG)

    def expert(self, number: int) -> Self:
        """The grid of one expert of a stack."""
        return self.part(number)

    @property
    def group(self) -> int | None:
        """Columns of a group; None for rows."""
        return self.group_size if self.group_size > 0 else None

    def refit(self, w_OC: Tensor, first: int) -> Self:
        """The grid whose group of columns from `first` on spans these; scales keep the dtype of the others."""
        ends = torch.finfo(self.scale_OG.dtype)

        def fitted(shrink_OG: Tensor | None) -> AffineGrid:
            new = AffineGrid.fit(
                w_OC,
                self.bits,
                -1,
                symmetric=self.zero_OG is None,
                zero_point="real" if self.zero_OG is not None and self.zero_OG.is_floating_point() else "integer",
                scale_dtype=self.scale_dtype,
                shrink_OG=shrink_OG,
            )
            scale_OG = new.scale_OG.float().clamp(ends.smallest_normal, ends.max)
            return replace(new, scale_OG=scale_OG.to(self.scale_OG.dtype))

        place = first // self.group_size
        one = fitted(clipped_shares(w_OC, fitted) if self.clipped else None)
        return self._with((slice(None), slice(place, place + 1)), one)

    def with_expert(self, number: int, part: Self) -> Self:
        """The grid of a stack with another one for one of its experts."""
        return self._with(number, part)

    def _with(self, where: Any, other: AffineGrid) -> Self:
        """The grid with another's scales and zero points in some places."""
        scale_OG, zero_OG = self.scale_OG.clone(), self.zero_OG
        scale_OG[where] = other.scale_OG
        if zero_OG is not None and other.zero_OG is not None:
            zero_OG = zero_OG.clone()
            zero_OG[where] = other.zero_OG
        return replace(self, scale_OG=scale_OG, zero_OG=zero_OG)

    def encode(self, w_OI: Tensor) -> Tensor:
        """The nearest codes, uint8 [.., O, I]; half way between two, the even multiple of the scale."""
        return self.round_columns(w_OI, 0)

    def encode_packed(self, w_OI: Tensor) -> Tensor:
        """The nearest codes of a matrix as stored, uint8 [O, P]; by the compiled kernels where they serve it."""
        width = affine.packed_width(w_OI.shape[-1], self.bits)
        packed = cpu_integer.encode_affine(w_OI, self.scale_OG, self.zero_OG, self.bits, self.group_size, width)
        return affine.pack(self.encode(w_OI), self.bits) if packed is None else packed

    def round_columns(self, w_OC: Tensor, first: int) -> Tensor:
        """The nearest codes of the columns from `first` on, uint8 [.., O, C]."""
        scale_OC, zero_OC = self._columns(first, w_OC.shape[-1])
        value = w_OC.float()
        if zero_OC is not None and self.zero_OG is not None and self.zero_OG.is_floating_point():
            value = ((value - zero_OC) / scale_OC).round_()
        else:
            value = (value / scale_OC).round_().add_(2 ** (self.bits - 1) if zero_OC is None else zero_OC)
        return value.clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes_OC: Tensor, first: int = 0) -> Tensor:
        """The float32 weights of codes of the columns from `first` on."""
        scale_OC, zero_OC = self._columns(first, codes_OC.shape[-1])
        if zero_OC is not None and self.zero_OG is not None and not self.zero_OG.is_floating_point():
            zero_OC = zero_OC.to(torch.uint8)
        return affine.decode(codes_OC, scale_OC, zero_OC, self.bits, 1)

    def _columns(self, first: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of a run of columns, float32 [.., O, C], or [.., O, 1] where all have the same."""
        size = self.group_size
        low, high = (0, 1) if size < 0 else (first // size, -(-(first + count) // size))
        skip = 0 if size < 0 else first % size

        def columns(values_OG: Tensor) -> Tensor:
            values_OG = values_OG[..., low:high].float()
            return values_OG if high - low == 1 else affine.spread(values_OG, skip + count, size)[..., skip:]

        return columns(self.scale_OG), None if self.zero_OG is None else columns(self.zero_OG)


SHRINKS = [1 - step / 100 for step in range(80)]
"""Shares of a group's range that are tried, 1 to .21, and the power of the error that is minimised: GPTQ's own code."""
POWER = 2.4


def clipped_shares(w_OI: Tensor, grid_of: Callable[[Tensor], AffineGrid], shrinks: Sequence[float] = SHRINKS) -> Tensor:
    """For each group, the share of its range on which its weights err least, [.., O, G].

    Args:
        grid_of: the grid for given shares.
        shrinks: those that are tried.
    """
    full = grid_of(torch.ones((), device=w_OI.device))
    groups, size = full.scale_OG.shape[-1], full.group_size
    place_I = torch.arange(w_OI.shape[-1], device=w_OI.device) // (size if size > 0 else w_OI.shape[-1])
    best_OG = torch.full(full.scale_OG.shape, torch.inf, device=w_OI.device)
    share_OG = torch.ones_like(best_OG)
    for shrink in shrinks:
        grid = grid_of(torch.tensor(shrink, device=w_OI.device))
        error_OI = (grid.decode(grid.encode(w_OI)) - w_OI.float()).abs_().pow_(POWER)
        error_OG = error_OI.new_zeros(*error_OI.shape[:-1], groups).index_add_(-1, place_I, error_OI)
        better = error_OG < best_OG
        best_OG, share_OG = torch.where(better, error_OG, best_OG), torch.where(better, shrink, share_OG)
    return share_OG


def _ends(w_OI: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each group, [.., O, G]."""
    width = w_OI.shape[-1]
    size = width if group_size < 0 else min(group_size, width)
    whole = width // size * size
    groups = w_OI[..., :whole].unflatten(-1, (-1, size))
    least, most = groups.amin(dim=-1), groups.amax(dim=-1)
    if whole == width:
        return least, most
    tail = w_OI[..., whole:]
    return (
        torch.cat([least, tail.amin(dim=-1, keepdim=True)], dim=-1),
        torch.cat([most, tail.amax(dim=-1, keepdim=True)], dim=-1),
    )


def _stored(scale_OG: Tensor) -> Tensor:
    """Scales in float16 where that keeps all of them normal, else in float32."""
    half = torch.finfo(torch.float16)
    fits = bool(((scale_OG >= half.smallest_normal) & (scale_OG <= half.max)).all())
    return scale_OG.to(torch.float16) if fits else scale_OG

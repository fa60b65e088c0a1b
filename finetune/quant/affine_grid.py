"""The grid of affine integer codes: scales and zero points of a weight, and the codes nearest to it.

Shape suffixes: O out features (or any leading dimensions), I in features, G groups of a row, C a run of columns.

A rounder (to nearest here, GPTQ or AWQ over the same object) asks a grid three things: `fit` it to a weight once,
`round_columns` of a weight that it may have moved meanwhile, `decode` codes. Scales are rounded to what is stored
before any code is chosen, so that codes are nearest to what will be decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

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
    """

    scale_OG: Tensor
    zero_OG: Tensor | None
    bits: int
    group_size: int

    @classmethod
    def fit(cls, w_OI: Tensor, bits: int, group_size: int, *, symmetric: bool, zero_point: str) -> Self:
        """The grid that spans each group of a weight, from its least to its largest value.

        - symmetric: scale = 2 max|w| / (2^bits - 1), the code 2^(bits-1) is zero (GPTQ's convention).
        - integer zero points: the span is widened to contain 0, which then is a code exactly.
        - real zero points: the least value is the zero point.

        A group without span gets scale 1, one that holds NaN or infinity a scale that is not finite either.
        """
        least_OG, most_OG = _ends(w_OI.float(), group_size)
        steps = 2**bits - 1
        if symmetric:
            scale_OG = 2 * torch.maximum(-least_OG, most_OG) / steps
        elif zero_point == "real":
            scale_OG = (most_OG - least_OG) / steps
        else:
            least_OG, most_OG = least_OG.clamp(max=0), most_OG.clamp(min=0)
            scale_OG = (most_OG - least_OG) / steps
        scale_OG = _stored(torch.where(scale_OG == 0, 1.0, scale_OG))
        zero_OG = None
        if not symmetric and zero_point == "real":
            zero_OG = least_OG
        elif not symmetric:
            zero_OG = (-least_OG / scale_OG.float()).round().clamp(0, steps).to(torch.uint8)
        return cls(scale_OG, zero_OG, bits, group_size)

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
        """Scale and zero point of a run of columns, float32 [.., O, C]."""
        size = self.group_size
        groups = slice(None) if size < 0 else slice(first // size, -(-(first + count) // size))
        skip = 0 if size < 0 else first % size

        def columns(values_OG: Tensor) -> Tensor:
            return affine.spread(values_OG[..., groups].float(), skip + count, size)[..., skip:]

        return columns(self.scale_OG), None if self.zero_OG is None else columns(self.zero_OG)


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

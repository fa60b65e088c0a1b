"""The grid of symmetric integers under one scale a row, one for each group of columns of a row, or one for the weight.

Shape suffixes: O out features (or any leading dimensions), I in features, C a run of columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from finetune.kernels import w8a8

LOSS = 2.0**-8
"""Relative error of a scale in 16 bits that is borne: 127 steps of it are off by less than half a step."""


@dataclass(frozen=True)
class W8A8Grid:
    """Where the codes of a weight lie.

    Attributes:
        scale: float32, [.., O, G] or [.., 1, 1]; for one matrix under one scale [1].
        bits: of a code.
        group_size: columns under one scale, where there are several scales a row.
    """

    scale: Tensor
    bits: int
    group_size: int = -1

    def part(self, rows: slice) -> Self:
        """Some of the rows of a matrix."""
        return self if self.scale.numel() == 1 else replace(self, scale=self.scale[rows])

    def expert(self, number: int) -> Self:
        """The scales of one expert."""
        return replace(self, scale=self.scale[number])

    def round_columns(self, w_OC: Tensor, first: int) -> Tensor:
        """The nearest codes, int8; half way, the even one."""
        most = w8a8.levels(self.bits)
        return w8a8.round_to(w_OC, self._columns(first, w_OC.shape[-1]), -most, most)

    def decode(self, codes_OC: Tensor, first: int = 0) -> Tensor:
        """`code * scale` in float32."""
        return codes_OC.float() * self._columns(first, codes_OC.shape[-1])

    def _columns(self, first: int, count: int) -> Tensor:
        """The scale of each of some columns, or one for all of them."""
        if self.scale.shape[-1] == 1:
            return self.scale
        columns = torch.arange(first, first + count, device=self.scale.device)
        return self.scale[..., columns // self.group_size]


def survivable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 scales that `dtype` holds exactly where it comes near: other libraries hold scales in a model's dtype."""
    near = scale.to(dtype).float()
    return torch.where((near - scale).abs() <= LOSS * scale, near, scale)

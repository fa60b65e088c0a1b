"""The grid of row-wise int8: 255 codes evenly around zero, one scale a row.

Shape suffixes: O out features (or any leading dimensions), I in features, C a run of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from finetune.kernels import int8


@dataclass(frozen=True)
class Int8Grid:
    """Where the codes of a weight lie.

    Attributes:
        absmax_O: float32, the largest magnitude of each row in float16, as bitsandbytes stores it.
    """

    absmax_O: Tensor

    def part(self, rows: slice) -> Self:
        """Some of the rows."""
        return type(self)(self.absmax_O[rows])

    def expert(self, number: int) -> Self:
        """The rows of one expert."""
        return type(self)(self.absmax_O[number])

    def round_columns(self, w_OC: Tensor, first: int) -> Tensor:
        """The nearest codes, int8; of the weight in float16, as bitsandbytes has it; half way, the even one."""
        factor_O = torch.where(self.absmax_O > 0, self.absmax_O.reciprocal() * int8.LEVELS, 0)
        half = torch.finfo(torch.float16).max
        value_OC = w_OC.float().clamp(-half, half).to(torch.float16).float()
        return (value_OC * factor_O.unsqueeze(-1)).round_().clamp_(-int8.LEVELS, int8.LEVELS).to(torch.int8)

    def decode(self, codes_OC: Tensor, first: int = 0) -> Tensor:
        """`code * (absmax / 127)` in float32."""
        return int8.decode(codes_OC, self.absmax_O)

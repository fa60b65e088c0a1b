"""The grid of row-wise int8: 255 codes evenly around zero, one scale a row.

Shape suffixes: O out features (or any leading dimensions), I in features, C a run of columns, K columns kept aside.
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
        columns_K: columns that decode to what they were, whatever their codes; None for none.
        kept_OK: float32, these.
    """

    absmax_O: Tensor
    columns_K: Tensor | None = None
    kept_OK: Tensor | None = None

    def part(self, rows: slice) -> Self:
        """Some of the rows."""
        return type(self)(self.absmax_O[rows], self.columns_K, None if self.kept_OK is None else self.kept_OK[rows])

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
        """`code * (absmax / 127)` in float32, and what was kept."""
        w_OC = int8.decode(codes_OC, self.absmax_O)
        if self.columns_K is not None and self.kept_OK is not None:
            here_K = (self.columns_K >= first) & (self.columns_K < first + w_OC.shape[-1])
            w_OC[..., self.columns_K[here_K].long() - first] = self.kept_OK[..., here_K]
        return w_OC

    def remainder(self, codes_OI: Tensor) -> Tensor | None:
        """What the codes of the kept columns lack, bf16 [O, K]; None for none."""
        if self.columns_K is None or self.kept_OK is None:
            return None
        return (self.kept_OK - int8.decode(codes_OI[:, self.columns_K.long()], self.absmax_O)).bfloat16()

"""Dropout that keeps a bit for every element instead of a second copy of the input.

Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting". What is dropped is drawn as
`torch.nn.functional.dropout` draws it on a CPU, from torch's default generator, so that a run resumes bit for bit and
a seed drops the same elements as there.

Shape suffixes: B leading dimensions, I features, K bytes of packed bits = ceil(elements / 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, read as one number, brings byte i to bit 56 + i; no two of its terms meet elsewhere."""
_REPEAT = 0x0101010101010101
"""Times a byte copies it into all eight."""
_SELECT = 0x8040201008040201 - 2**64
"""Bit i of byte i, as a signed number."""


def draw_kept(x_BI: Tensor, dropout: float) -> Tensor:
    """Which elements of `x_BI` stay, each with probability `1 - dropout`: bits, uint8 [K], element 8 k + i in bit i."""
    count = x_BI.numel()
    drawn = torch.empty(count, dtype=torch.uint8, device=x_BI.device).bernoulli_(1 - dropout)
    words = torch.nn.functional.pad(drawn, (0, -count % 8)).view(torch.int64)
    return (words * _GATHER).bitwise_right_shift(56).to(torch.uint8)


def zero_dropped(x_BI: Tensor, kept_K: Tensor | None) -> Tensor:
    """`x_BI` with zeros in the place of what is not kept, not scaled up; `x_BI` itself where no bits are given."""
    if kept_K is None:
        return x_BI
    spread = (kept_K.to(torch.int64) * _REPEAT).bitwise_and_(_SELECT)
    kept = spread.view(torch.uint8)[: x_BI.numel()].clamp_(max=1).view(x_BI.shape)
    return x_BI * kept

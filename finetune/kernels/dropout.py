"""Dropout that keeps a bit for every element instead of a second copy of the input.

Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting". Two operators:
`finetune::kept_bits` makes the bits from a seed, `finetune::zero_dropped` applies them. The seed comes from torch's
default generator, so a run resumes bit for bit; the bits follow from it alone, whatever the instruction set and the
threads. (torch's own generator takes 5 ns an element on a CPU: more than the product beside it.)

Shape suffixes: B leading dimensions, I features, K bytes of packed bits = ceil(elements / 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels import cpu_dropout

_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, read as one number, brings byte i to bit 56 + i; no two of its terms meet elsewhere."""
_REPEAT = 0x0101010101010101
"""Times a byte copies it into all eight."""
_SELECT = 0x8040201008040201 - 2**64
"""Bit i of byte i, as a signed number."""
STEPS = 1 << 16
"""Values of an element's random bits: what share is kept is exact to one part in so many."""

_library = torch.library.Library("finetune", "FRAGMENT")
_library.define("kept_bits(Tensor seed, SymInt count, int threshold) -> Tensor")
_library.define("zero_dropped(Tensor x, Tensor kept) -> Tensor")


def draw_kept(x_BI: Tensor, dropout: float) -> Tensor:
    """Which elements of `x_BI` stay, each with probability `1 - dropout`: bits, uint8 [K], element 8 k + i in bit i.

    Takes one number from the default generator of the device on a CPU, one for each element elsewhere.
    """
    if x_BI.device.type == "cpu":
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
        return torch.ops.finetune.kept_bits(seed, x_BI.numel(), round((1 - dropout) * STEPS))
    drawn = torch.empty(x_BI.numel(), dtype=torch.uint8, device=x_BI.device).bernoulli_(1 - dropout)
    return _pack(drawn)


def zero_dropped(x_BI: Tensor, kept_K: Tensor | None) -> Tensor:
    """`x_BI` with zeros in the place of what is not kept, not scaled up; `x_BI` itself where no bits are given."""
    return x_BI if kept_K is None else torch.ops.finetune.zero_dropped(x_BI, kept_K)


def _kept_bits(seed: Tensor, count: int, threshold: int) -> Tensor:
    """A bit for each element, set where its 16 random bits are below the threshold.

    SplitMix64 (csrc/dropout.cpp) in signed numbers, which wrap as unsigned ones do.
    """
    place = torch.arange(-(-count // 8) * 2, dtype=torch.int64, device=seed.device)
    z = seed + (place + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    quarters = torch.stack([_shift(z, 16 * i) & 0xFFFF for i in range(4)], dim=1)
    return _pack((quarters < threshold).view(-1).to(torch.uint8))


def _zero_dropped(x: Tensor, kept: Tensor) -> Tensor:
    spread = (kept.to(torch.int64) * _REPEAT).bitwise_and_(_SELECT)
    return x * spread.view(torch.uint8)[: x.numel()].clamp_(max=1).view(x.shape)


def _pack(bits_N: Tensor) -> Tensor:
    """Eight bytes of 0 or 1 to a byte."""
    words = torch.nn.functional.pad(bits_N, (0, -bits_N.numel() % 8)).view(torch.int64)
    return (words * _GATHER).bitwise_right_shift(56).to(torch.uint8)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in."""
    return (z >> places) & (2 ** (64 - places) - 1) if places else z


def _bits_fake(seed: Tensor, count: int, threshold: int) -> Tensor:
    return seed.new_empty([(count + 7) // 8], dtype=torch.uint8)


torch.library.impl("finetune::kept_bits", "default")(_kept_bits)
torch.library.impl("finetune::zero_dropped", "default")(_zero_dropped)
torch.library.register_fake("finetune::kept_bits")(_bits_fake)
torch.library.register_fake("finetune::zero_dropped")(lambda x, kept: torch.empty_like(x))
cpu_dropout.register(_zero_dropped)

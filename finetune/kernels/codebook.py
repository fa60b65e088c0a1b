"""The value tables of the codebook formats: NF4, FP4, and the signed 8-bit dynamic map of double quantization.

A code is an index into its table; a decoded weight is `table[code] * absmax`, in float32.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 3 and appendix E: quantiles of N(0, 1) at 8 evenly spaced
probabilities from .9677083 towards .5 (the positive side) and at 7 (the negative side), an exact zero between them,
divided by the largest. Kept as the paper's literals, since another inverse normal would move their last bits; a test
derives them again to 1e-6."""

_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""bitsandbytes' FP4: a sign bit above 2 exponent bits and 1 mantissa bit, in the order of the bit patterns, before the
division by 12 that puts the largest at 1. Pattern 0b001 is the subnormal. The order is not that of the values."""

DYNAMIC_EXPONENTS = 7
"""Decades that the 8-bit dynamic map spans (Dettmers 2016, arXiv:1511.04561, section 2.2)."""

CODEBOOKS = ("nf4", "fp4")


@cache
def table(codebook: str, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit codebook by code, float32 [16], the largest magnitude 1.

    Args:
        codebook: "nf4" or "fp4".

    Raises:
        ValueError: for another name.
    """
    if codebook == "nf4":
        values = list(_NF4)
    elif codebook == "fp4":
        # 0.0 - x, not -x: code 8 is "minus zero" by its bits, and bitsandbytes' table holds +0.0 there.
        values = [*_FP4_MAGNITUDES, *(0.0 - magnitude for magnitude in _FP4_MAGNITUDES)]
    else:
        raise ValueError(f"no codebook is called {codebook!r}: have {', '.join(CODEBOOKS)}")
    with torch.inference_mode(False):
        entries = torch.tensor(values, dtype=torch.float32)
        return (entries / entries.abs().max()).to(device)


class Decision(NamedTuple):
    """How a float32 value finds its code: by its upper 16 bits, and one comparison.

    Values that share their upper 16 bits (the key) have at most one midpoint of the table among them. So
    `code = above[key] if value > threshold[key] else below[key]` is exact, and much faster than torch's binary search.

    Attributes:
        below, above: codes on either side, uint8 [65536].
        threshold: the midpoint among the values of a key, infinity where there is none, float32 [65536].
    """

    below: Tensor
    above: Tensor
    threshold: Tensor


@cache
def decision(codebook: str, device: torch.device) -> Decision:
    """The nearest table entry for every float32; a value half way between two belongs to the lower one."""
    with torch.inference_mode(False):
        values, order = table(codebook, torch.device("cpu")).sort(stable=True)
        mids, codes = midpoints(values), order.to(torch.uint8)
        bits = torch.arange(65536, dtype=torch.int32) << 16
        ends = torch.stack([bits, bits | 0xFFFF]).view(torch.float32)
        first, last = (torch.bucketize(end, mids) for end in (ends.amin(dim=0), ends.amax(dim=0)))
        threshold = torch.where(last > first, mids[first.clamp(max=mids.numel() - 1)], torch.inf)
        return Decision(codes[first].to(device), codes[last].to(device), threshold.to(device))


@cache
def pair_table(codebook: str, device: torch.device) -> Tensor:
    """The two values behind each packed byte, [256], each pair of float32 viewed as one 64-bit element.

    The first weight sits in the high nibble. As one element a pair is gathered by one `index_select` step.
    """
    with torch.inference_mode(False):
        values = table(codebook, torch.device("cpu"))
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
        return pairs.view(torch.float64).view(-1).to(device)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The signed 8-bit dynamic map, sorted, float32 [256].

    For each decade i = 0..6 the 2^i midpoints of an even division of [.1, 1] times 10^(i-6), with both signs, and 0 and
    1 (there is no -1): 8-bit Approximations for Parallelism in Deep Learning (arXiv:1511.04561), as in bitsandbytes.
    """
    with torch.inference_mode(False):
        positive: list[float] = []
        for exponent in range(DYNAMIC_EXPONENTS):
            fractions = midpoints(torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32))
            positive += (10 ** (exponent - DYNAMIC_EXPONENTS + 1) * fractions).tolist()
        entries = [*positive, *(-value for value in positive), 0.0, 1.0]
        return torch.tensor(sorted(entries), dtype=torch.float32).to(device)


@cache
def dynamic_lookup(device: torch.device) -> Tensor:
    """The code of each of 65,536 evenly spaced values from -1 to 1, uint8 [65536]: how bitsandbytes encodes on a CPU.

    About 0.15 % of random values get a neighbour of the nearest entry by this table; being bit-exact needs it.
    """
    with torch.inference_mode(False):
        grid = (torch.arange(65536, dtype=torch.float64) / 65535 * 2 - 1).float()
        codes = torch.bucketize(grid, midpoints(dynamic_map(torch.device("cpu"))))
        return codes.to(torch.uint8).to(device)


def midpoints(sorted_values: Tensor) -> Tensor:
    """The points half way between neighbours, in the dtype of the values."""
    return (sorted_values[:-1] + sorted_values[1:]) / 2

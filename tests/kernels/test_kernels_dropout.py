"""Dropout in bits: the share that stays, what decides it, and the compiled kernels against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.kernels import dropout, native
from finetune.kernels.dropout import draw_kept, zero_dropped


def kept(count: int, share: float, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    ones = torch.ones(count)
    return zero_dropped(ones, draw_kept(ones, share)) != 0


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_drops_its_share_without_a_pattern(share: float) -> None:
    count = 1 << 18
    seen = kept(count, share, 3).double()
    spread = (share * (1 - share) / count) ** 0.5
    assert abs(seen.mean() - (1 - share)) < 5 * spread
    centred = seen - seen.mean()
    for distance in (1, 2, 3, 4, 8, 32, 1024):
        correlation = (centred[distance:] * centred[:-distance]).mean() / centred.square().mean()
        assert abs(correlation) < 5 / count**0.5, distance
    other = kept(count, share, 4).double()
    assert abs(((other - other.mean()) * centred).mean()) < 5 * share * (1 - share) / count**0.5


def test_the_seed_decides_and_one_number_is_drawn() -> None:
    assert torch.equal(kept(1000, 0.5, 7), kept(1000, 0.5, 7))
    assert not torch.equal(kept(1000, 0.5, 7), kept(1000, 0.5, 8))
    torch.manual_seed(9)
    draw_kept(torch.ones(5000), 0.1)
    after = torch.get_rng_state()
    torch.manual_seed(9)
    draw_kept(torch.ones(3), 0.1)
    assert torch.equal(after, torch.get_rng_state())
    x = torch.ones(100)
    assert not torch.equal(draw_kept(x, 0.5), draw_kept(x, 0.5))


@pytest.mark.skipif(native.why_off() is not None, reason=str(native.why_off()))
@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(0, 300) | st.integers(16380, 16420),
    threshold=st.integers(0, dropout.STEPS),
    seed=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_compiled_equals_reference_bit_for_bit(
    level: str, count: int, threshold: int, seed: int, dtype: torch.dtype
) -> None:
    number = torch.tensor([seed])
    reference = dropout._kept_bits(number, count, threshold)
    x = torch.arange(1, count + 1).to(dtype)
    with native.at_most(level):
        bits = torch.ops.finetune.kept_bits(number, count, threshold)
        seen = zero_dropped(x, bits)
    assert torch.equal(bits, reference)
    assert torch.equal(seen, dropout._zero_dropped(x, bits)) and seen.dtype == dtype
    assert int((seen != 0).sum()) <= count and (threshold < dropout.STEPS or torch.equal(seen, x))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.finetune.kept_bits, (torch.tensor([5]), 77, 1 << 15))
    x = torch.randn(7, 11)
    bits = draw_kept(x, 0.5)
    torch.library.opcheck(torch.ops.finetune.zero_dropped, (x, bits))
    strided = torch.randn(11, 7).t()
    assert torch.equal(zero_dropped(strided, bits), zero_dropped(strided.contiguous(), bits))

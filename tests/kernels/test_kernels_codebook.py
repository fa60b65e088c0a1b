"""The tables against bitsandbytes' and against their definitions."""

from __future__ import annotations

import pytest
import torch

from finetune.kernels import codebook as books

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", books.CODEBOOKS)
def test_tables_equal_bitsandbytes(name: str) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(books.table(name, CPU), oracle.get_4bit_type(name, device="cpu"))


def test_dynamic_map_equals_bitsandbytes() -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(books.dynamic_map(CPU), oracle.create_dynamic_map())


def test_nf4_levels_are_normal_quantiles() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(0.9677083, 0.5, 8)[:-1])
    levels = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    torch.testing.assert_close(books.table("nf4", CPU), levels / levels.max(), rtol=0, atol=1e-6)


def test_fp4_levels_are_those_of_a_float_with_two_exponent_bits() -> None:
    normal = [mantissa * 2.0**exponent for exponent in range(1, 4) for mantissa in (1.0, 1.5)]
    magnitudes = torch.tensor([0.0, 0.0625, *normal]) / 12
    values = books.table("fp4", CPU)
    assert torch.equal(values[:8].sort().values, magnitudes)
    assert torch.equal(values[8:], -values[:8])


@pytest.mark.parametrize("name", books.CODEBOOKS)
def test_decisions_are_a_binary_search_over_the_midpoints(name: str) -> None:
    """On every midpoint, its neighbours among float32, and each end of every key of 16 bits."""
    values, order = books.table(name, CPU).sort(stable=True)
    mids = books.midpoints(values)
    below, above, threshold = books.decision(name, CPU)
    bits = torch.arange(65536, dtype=torch.int32) << 16
    ends = torch.cat([bits, bits | 0xFFFF]).view(torch.float32)
    far = torch.tensor(2.0)
    near = torch.cat([mids, torch.nextafter(mids, far), torch.nextafter(mids, -far)])
    x = torch.cat([ends[ends.isfinite()], near, values])
    key = (x.view(torch.int32) >> 16) & 0xFFFF
    found = torch.where(x > threshold[key], above[key], below[key])
    assert torch.equal(found, order[torch.bucketize(x, mids)].to(torch.uint8))


@pytest.mark.parametrize("name", books.CODEBOOKS)
def test_pair_table_is_high_nibble_first(name: str) -> None:
    pairs = books.pair_table(name, CPU).view(torch.float32).view(256, 2)
    values = books.table(name, CPU)
    for byte in (0x00, 0x0F, 0xF0, 0x3A, 0xFF):
        assert pairs[byte].tolist() == [values[byte >> 4].item(), values[byte & 15].item()]


def test_tables_made_in_inference_mode_serve_outside() -> None:
    books.pair_table.cache_clear()
    with torch.inference_mode():
        books.pair_table("nf4", CPU)
    assert not books.pair_table("nf4", CPU).is_inference()


def test_unknown_codebook_is_named() -> None:
    with pytest.raises(ValueError, match=r"af4.*nf4, fp4"):
        books.table("af4", CPU)

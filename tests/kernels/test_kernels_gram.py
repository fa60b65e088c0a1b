"""Second moments of inputs: the compiled kernel at each level against float64, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.kernels import native
from finetune.kernels.gram import PANEL, add_gram_, mirror_, reference


def inputs(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Features of several sizes around means of their own."""
    torch.manual_seed(rows + width)
    return (torch.randn(rows, width) * torch.rand(width) + 0.3 * torch.randn(width)).to(dtype)


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (64, 96), (65, 288), (700, 5), (1100, 544)])
def test_it_is_the_product_in_float64(rows: int, width: int, dtype: torch.dtype, level: str) -> None:
    x_NI = inputs(rows, width, dtype)
    before = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    before = before + before.T
    found = before.clone()
    with native.at_most(level):
        add_gram_(found, x_NI)
    mirror_(found)
    wide = x_NI.double()
    # Rounding of float32 sums is all that there is, but AVX512's product of bf16 rounds every sum towards zero.
    most = (wide.abs().T @ wide.abs()) * (2**-15 if dtype == torch.bfloat16 else 2**-18) + 1e-5
    assert bool(((found.double() - before.double() - wide.T @ wide).abs() <= most).all())
    assert torch.equal(found, found.T)


def test_what_is_left_of_the_diagonal_blocks_stays() -> None:
    found = torch.full((2 * PANEL, 2 * PANEL), 7.0)
    add_gram_(found, inputs(40, 2 * PANEL, torch.bfloat16))
    assert bool((found[PANEL:, :PANEL] == 7).all()) and not bool((found[:PANEL] == 7).any())


def test_bf16_inputs_are_multiplied_as_they_are() -> None:
    """Small whole numbers: every sum is exact."""
    x_NI = torch.randint(-16, 17, (600, 320)).bfloat16()
    found, wanted = torch.zeros(320, 320), torch.zeros(320, 320)
    add_gram_(found, x_NI)
    reference(wanted, x_NI)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_and_no_rows(dtype: torch.dtype) -> None:
    x_NI = inputs(70, 192, dtype)
    found, wanted = torch.zeros(96, 96), torch.zeros(96, 96)
    add_gram_(found, x_NI[:, ::2])
    add_gram_(found, x_NI[:0, ::2])
    add_gram_(wanted, x_NI[:, ::2].contiguous())
    assert torch.equal(found, wanted)


def test_what_is_not_finite_shows() -> None:
    for bad in (torch.inf, torch.nan):
        x_NI = inputs(10, 64, torch.float32)
        x_NI[3, 5] = bad
        found = torch.zeros(64, 64)
        add_gram_(found, x_NI)
        assert not bool(found[5].isfinite().any())

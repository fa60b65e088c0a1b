"""Outputs at learnt lengths: against float64 at every level, odd shapes, each type, threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.kernels import lengths, native

LEVELS = native.LEVELS if native.library() is not None else ("scalar",)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 4e-3}


def problem(rows: int, outputs: int, dtype: torch.dtype, biased: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(outputs)
    y = torch.randn(rows, outputs, generator=generator).to(dtype)
    norm = 1 + torch.rand(outputs, generator=generator)
    magnitude = norm * (1 + 0.1 * torch.randn(outputs, generator=generator))
    bias = torch.randn(outputs, generator=generator) if biased else None
    return y, magnitude, norm, bias, torch.randn(rows, outputs, generator=generator).to(dtype)


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    outputs=st.sampled_from([1, 3, 16, 17, 500, 512, 513, 1040]),
    biased=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_equals_float64(level: str, rows: int, outputs: int, biased: bool, dtype: torch.dtype) -> None:
    y, magnitude, norm, bias, grad = problem(rows, outputs, dtype, biased)
    wide_y, wide_m = y.double().requires_grad_(), magnitude.double().requires_grad_()
    wide_b = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.double()
    exact = (wide_y - wide_b) * (wide_m / norm.double()) + wide_b
    wanted = torch.autograd.grad(exact, (wide_y, wide_m), grad.double())
    with native.at_most(level):
        scaled = y.clone()
        lengths.scale_outputs_(scaled, magnitude, norm, bias)
        grad_y, grad_m = lengths.scale_outputs_backward(grad, scaled, magnitude, norm, bias)
    assert scaled.dtype == grad_y.dtype == dtype
    assert grad_m.dtype == torch.float32
    assert worst(scaled, exact.detach()) <= TOLERANCE[dtype]
    assert worst(grad_y, wanted[0]) <= TOLERANCE[dtype]
    assert worst(grad_m, wanted[1]) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("level", LEVELS)
def test_where_nothing_has_changed_the_bits_stay(level: str, dtype: torch.dtype) -> None:
    y, _, norm, bias, grad = problem(7, 530, dtype, biased=True)
    with native.at_most(level):
        scaled = y.clone()
        lengths.scale_outputs_(scaled, norm.clone(), norm, bias)
        grad_y, _ = lengths.scale_outputs_backward(grad, scaled, norm, norm, bias)
    assert torch.equal(scaled, y)
    assert torch.equal(grad_y, grad)


def test_a_row_of_no_length_learns_nothing() -> None:
    y, magnitude, norm, _, grad = problem(3, 20, torch.float32, biased=False)
    magnitude[4], magnitude[5] = 0.0, -1e-7
    lengths.scale_outputs_(y, magnitude, norm, None)
    _, grad_m = lengths.scale_outputs_backward(grad, y, magnitude, norm, None)
    assert torch.isfinite(grad_m).all()
    assert grad_m[4] == grad_m[5] == 0
    assert (grad_m[6:].abs() > 0).all()


def test_any_leading_dimensions_strides_and_threads() -> None:
    y, magnitude, norm, bias, grad = problem(12, 1100, torch.bfloat16, biased=True)
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            scaled = y.clone().view(3, 4, 1100)
            lengths.scale_outputs_(scaled, magnitude, norm, bias)
            strided = grad.view(3, 4, 1100).transpose(0, 1).contiguous().transpose(0, 1)
            found.append((scaled, *lengths.scale_outputs_backward(strided, scaled, magnitude, norm, bias)))
        finally:
            torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    assert found[0][1].shape == (3, 4, 1100)


def test_operators_keep_their_contract() -> None:
    y, magnitude, norm, bias, grad = problem(3, 20, torch.float32, biased=True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.finetune.scale_outputs_, (y, magnitude, norm, bias), test_utils=checks)
    torch.library.opcheck(
        torch.ops.finetune.scale_outputs_backward, (grad, y, magnitude, norm, None), test_utils=checks
    )

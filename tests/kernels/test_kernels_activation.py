"""Gated activations: against float64 autograd at every level, far out as well, and on halves of one projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.kernels import fused, native

LEVELS = native.LEVELS if native.library() is not None else ("scalar",)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
EXACT = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


def relative(found: Tensor | None, exact: Tensor) -> float:
    """The largest error in units of the largest value."""
    assert found is not None
    return float((found.detach().double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def test_every_activation_has_an_oracle() -> None:
    assert list(EXACT) == list(fused.ACTIVATIONS)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), width=st.integers(1, 70), halves=st.booleans(), dtype=st.sampled_from(list(TOLERANCE)))
def test_act_mul_equals_float64(level: str, name: str, rows: int, width: int, halves: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    both = (3 * torch.randn(2, rows, 2 * width)).to(dtype)
    gate, up = both.chunk(2, dim=-1) if halves else (half.contiguous() for half in both.chunk(2, dim=-1))
    gate, up, seed = gate.requires_grad_(), up.requires_grad_(), torch.randn(2, rows, width).to(dtype)
    with native.at_most(level):
        y = fused.act_mul(gate, up, name)
        grads = torch.autograd.grad(y, (gate, up), seed)
    wide = [tensor.detach().double().requires_grad_() for tensor in (gate, up)]
    exact = EXACT[name](wide[0]) * wide[1]
    expected = torch.autograd.grad(exact, wide, seed.double())
    assert y.dtype == dtype and relative(y, exact.detach()) <= TOLERANCE[dtype]
    for found, wanted in zip(grads, expected, strict=True):
        assert found.dtype == dtype and relative(found, wanted) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", EXACT)
def test_far_from_zero_nothing_overflows(name: str, level: str) -> None:
    gate = torch.tensor([-1e4, -300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0, 1e4], requires_grad=True)
    with native.at_most(level):
        y = fused.act_mul(gate, torch.ones(9), name)
        (grad,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(y, fused.ACTIVATIONS[name](gate), atol=1e-6, rtol=1e-5)
    assert bool(grad.isfinite().all()) and grad[0].abs() < 1e-6 and abs(grad[-1] - 1) < 1e-6


@pytest.mark.parametrize("name", EXACT)
def test_a_nan_stays_one(name: str) -> None:
    gate = torch.tensor([1.0, torch.nan, 2.0]).bfloat16()
    assert fused.act_mul(gate, torch.ones_like(gate), name).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_act_mul_passes_opcheck(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(2, 3, 20, dtype=dtype, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.finetune.act_mul, (gate, up, "silu"))
    gate, up = torch.randn(3, 40, dtype=dtype).chunk(2, dim=-1)
    torch.library.opcheck(torch.ops.finetune.act_mul, (gate, up, "gelu"))


def test_act_mul_compiles_without_a_break() -> None:
    def step(both: Tensor) -> Tensor:
        return fused.act_mul(*both.chunk(2, dim=-1), "silu").sum()

    both = torch.randn(4, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(both), both)
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(grad, torch.autograd.grad((F.silu(gate) * up).sum(), both)[0])

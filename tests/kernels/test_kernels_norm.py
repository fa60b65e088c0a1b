"""RMSNorm and the rotation of heads: against float64 autograd at every level, at shapes that fill no vector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.kernels import fused, native

LEVELS = native.LEVELS if native.library() is not None else ("scalar",)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def relative(found: Tensor | None, exact: Tensor) -> float:
    """The largest error in units of the largest value."""
    assert found is not None
    return float((found.detach().double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def exact_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """The textbook's formula, in whatever dtype it is given."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)


def norm_gradients(x: Tensor, weight: Tensor, seed: Tensor, eps: float, offset: float) -> tuple[Tensor, ...]:
    """Output and gradients in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    y = exact_norm(*wide, eps, offset)
    return y.detach(), *torch.autograd.grad(y, wide, seed.double())


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    dtype=st.sampled_from(list(TOLERANCE)),
    wide_weight=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_norm_equals_float64(level: str, rows: int, width: int, dtype: torch.dtype, wide_weight: bool, offset: float):
    torch.manual_seed(rows * 100 + width)
    x = torch.randn(2, rows, width).to(dtype).requires_grad_()
    weight = torch.randn(width).to(torch.float32 if wide_weight else dtype).requires_grad_()
    seed = torch.randn(2, rows, width).to(dtype)
    with native.at_most(level):
        y = fused.rms_norm(x, weight, 1e-5, offset)
        y.backward(seed)
    exact = norm_gradients(x, weight, seed, 1e-5, offset)
    assert y.dtype == dtype and weight.grad is not None and weight.grad.dtype == weight.dtype
    # one feature: the gradient of x is a difference of equal terms
    assert relative(y, exact[0]) <= TOLERANCE[dtype]
    assert width == 1 or relative(x.grad, exact[1]) <= 4 * TOLERANCE[dtype]
    assert relative(weight.grad, exact[2]) <= 2 * TOLERANCE[dtype if weight.dtype == dtype else torch.float32] + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_passes_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 24, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.finetune.rms_norm, (x, torch.randn(24, dtype=dtype, requires_grad=True), 1e-6, 1.0))
    torch.library.opcheck(torch.ops.finetune.rms_norm, (x.permute(1, 0, 2), torch.randn(24, dtype=dtype), 1e-6, 0.0))


def test_norm_has_the_same_bits_whatever_the_grad_mode_and_rows() -> None:
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    with torch.no_grad():
        silent = fused.rms_norm(x, weight, 1e-6)
    assert torch.equal(fused.rms_norm(x.clone().requires_grad_(), weight, 1e-6), silent)
    assert torch.equal(fused.rms_norm(x[17:18], weight, 1e-6), silent[17:18])


def test_a_frozen_weight_costs_no_gradient() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    seen: list[bool] = []
    original = torch.ops.finetune.rms_norm_backward

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is original.default:
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    y = fused.rms_norm(x, weight, 1e-6)
    with Watch():
        y.sum().backward()
    assert seen == [False]


def test_norm_of_many_rows_on_two_threads_is_that_on_one() -> None:
    x, weight, seed = torch.randn(700, 512), torch.randn(512, requires_grad=True), torch.randn(700, 512)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = fused.rms_norm(x.requires_grad_(), weight, 1e-6)
            results.append((y, *torch.autograd.grad(y, (x, weight), seed)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], atol=1e-4, rtol=1e-4)  # summed in another order


# ---- Rotation


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers rotates, partly where cos is narrower than a head."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos.unsqueeze(2) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(2)
    return torch.cat([turned, rest], dim=-1)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3)),
    half=st.integers(1, 20),
    rest=st.integers(0, 9),
    shared=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_rope_equals_float64(
    level: str, sizes: tuple[int, int, int], half: int, rest: int, shared: bool, dtype: torch.dtype
) -> None:
    B, S, H = sizes
    torch.manual_seed(half)
    x = torch.randn(B, S, H, 2 * half + rest).to(dtype).requires_grad_()
    cos, sin = torch.randn(2, 1 if shared else B, S, 2 * half).to(dtype)
    seed = torch.randn_like(x)
    with native.at_most(level):
        y = fused.rope(x, cos, sin)
        y.backward(seed)
    wide = x.detach().double().requires_grad_()
    exact = exact_rope(wide, cos.double(), sin.double())
    (grad,) = torch.autograd.grad(exact, wide, seed.double())
    assert relative(y, exact.detach()) <= TOLERANCE[dtype] and relative(x.grad, grad) <= TOLERANCE[dtype]


def test_rope_passes_opcheck_and_takes_strided_heads() -> None:
    x, (cos, sin) = torch.randn(2, 3, 5, 12, requires_grad=True), torch.randn(2, 1, 5, 8)
    torch.library.opcheck(torch.ops.finetune.rope, (x.transpose(1, 2), cos, sin, False))
    assert torch.equal(fused.rope(x.transpose(1, 2), cos, sin), fused.rope(x.transpose(1, 2).contiguous(), cos, sin))


def test_both_compile_without_a_break() -> None:
    def step(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return fused.rope(fused.rms_norm(x, weight, 1e-6), cos, sin).sum()

    x, weight, (cos, sin) = torch.randn(2, 5, 3, 8, requires_grad=True), torch.randn(8), torch.randn(2, 1, 5, 8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x, weight, cos, sin), x)
    torch.testing.assert_close(grad, torch.autograd.grad(step(x, weight, cos, sin), x)[0])

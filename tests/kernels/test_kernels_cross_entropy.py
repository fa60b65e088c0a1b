"""Chunked cross entropy against dense float64 algebra."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.kernels import native
from finetune.kernels.cross_entropy import linear_cross_entropy


def dense(hidden, weight, labels, bias, scale, softcap):
    logits = scale * F.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(37, 24), torch.randn(211, 24), torch.randn(211)
    labels = torch.randint(0, 211, (37,))
    labels[::5] = -100
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], labels


@pytest.mark.parametrize("chunk", [1, 7, 1000, None])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 5.0), (2.0, 30.0)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_float64_algebra(chunk: int | None, scale: float, softcap: float | None, with_bias: bool) -> None:
    (hidden, weight, bias), labels = problem()
    loss = linear_cross_entropy(
        hidden, weight, labels, bias_V=bias if with_bias else None, scale=scale, softcap=softcap, chunk=chunk
    )
    (loss * 0.5).backward()
    (hidden64, weight64, bias64), _ = problem(torch.float64)
    oracle = dense(hidden64, weight64, labels, bias64 if with_bias else None, scale, softcap)
    (oracle * 0.5).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-6)
    pairs = [(hidden, hidden64), (weight, weight64)] + ([(bias, bias64)] if with_bias else [])
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    (hidden, weight, _), labels = problem()
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None and weight.grad is None


def test_nothing_learnt_is_zero_with_zero_gradient() -> None:
    (hidden, weight, _), labels = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_hidden_states(dtype: torch.dtype) -> None:
    (hidden, weight, _), labels = problem(dtype)
    loss = linear_cross_entropy(hidden, weight, labels)
    (loss / 30).backward()
    (hidden64, weight64, _), _ = problem(torch.float64)
    oracle = dense(hidden64, weight64, labels, None, 1.0, None)
    (oracle / 30).backward()
    assert loss.item() == pytest.approx(oracle.item(), rel=2e-2)
    assert hidden.grad.dtype == dtype
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=5e-2, atol=5e-3)


def test_logits_never_exist_whole() -> None:
    """The largest piece of memory that the forward and the backward ask for is a chunk's."""
    hidden = torch.randn(512, 8, requires_grad=True)
    weight, labels = torch.randn(1000, 8), torch.randint(0, 1000, (512,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels, chunk=16).backward()
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::"))
    assert 0 < largest <= 16 * 1000 * 4


@pytest.mark.parametrize("needed", [[True, False, False], [True, True, True], [False, False, False]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, needed: list[bool]) -> None:
    tensors, labels = problem(dtype)
    hidden, weight, bias = (t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True))
    arguments = (hidden, weight, bias, labels, 0.5, None, 16, needed)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.library.opcheck(torch.ops.finetune.linear_cross_entropy, arguments, rtol=tolerance, atol=tolerance)
    z, own = torch.randn(5, 9, dtype=dtype), torch.tensor([0, 8, 3, 3, 1])
    torch.library.opcheck(torch.ops.finetune.cross_entropy_, (z, own, 1.0, None, True))


def test_compiles_without_a_break() -> None:
    (hidden, weight, _), labels = problem()
    weight = weight.detach()

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels) / 3

    found, wanted = (
        torch.autograd.grad(f(hidden), hidden)[0]
        for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run)
    )
    assert torch.equal(found, wanted)


needs_library = pytest.mark.skipif(native.why_off() is not None, reason=str(native.why_off()))
LEVELS = [name for name in native.LEVELS if native.LEVELS.index(name) <= native.LEVELS.index("avx512")]


@needs_library
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    gradient=st.booleans(),
)
@pytest.mark.parametrize("level", LEVELS)
def test_compiled_equals_reference(
    level: str, rows: int, vocab: int, dtype: torch.dtype, scale: float, softcap: float | None, gradient: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + vocab)
    z = (torch.randn(rows, vocab, generator=generator) * 6).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    # beyond the last row nothing may be written
    room = torch.full((rows + 1, vocab), 7.0, dtype=dtype)
    room[:rows] = z
    with native.at_most(level):
        loss = torch.ops.finetune.cross_entropy_(room[:rows], labels, scale, softcap, gradient)
    exact = z.double().requires_grad_()
    wanted = dense(exact, torch.eye(vocab, dtype=torch.float64), labels, None, scale, softcap)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-5)
    assert (room[rows:] == 7).all()
    epsilon = max(torch.finfo(dtype).eps / 2, 1e-6) * 1.01
    right = exact.grad if gradient else z.double()
    assert right is not None
    torch.testing.assert_close(room[:rows].double(), right, rtol=epsilon, atol=2e-6 * scale)


@needs_library
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("level", LEVELS)
def test_a_logit_that_is_not_finite_shows_in_the_loss(level: str, bad: float) -> None:
    z = torch.randn(3, 40)
    z[1, 7] = bad
    with native.at_most(level):
        loss = torch.ops.finetune.cross_entropy_(z, torch.tensor([1, 2, 3]), 1.0, None, True)
    assert not loss.isfinite()


@pytest.mark.parametrize("label", [-1, 211])
def test_a_label_that_is_no_token_is_refused(label: int) -> None:
    (hidden, weight, _), labels = problem()
    labels[3] = label
    with pytest.raises((IndexError, RuntimeError), match=r"expected 0 to 210|out of bounds"):
        linear_cross_entropy(hidden, weight, labels)

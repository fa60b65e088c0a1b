"""Chunked cross entropy against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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
    """The largest tensor that the forward and the backward make is a chunk's."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(512, 8, requires_grad=True)
    weight, labels = torch.randn(1000, 8), torch.randint(0, 1000, (512,))
    with Watch():
        linear_cross_entropy(hidden, weight, labels, chunk=16).backward()
    assert largest == 16 * 1000

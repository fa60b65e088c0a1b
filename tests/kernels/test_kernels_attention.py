"""Attention: against float64 autograd at every level, under every mask, at lengths and widths that fill no block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.kernels import attention, fused, native

LEVELS = native.LEVELS if native.library() is not None else ("scalar",)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
Heads = tuple[Tensor, Tensor, Tensor]


def heads(B: int, H: int, G: int, Q: int, K: int, D: int, dtype: torch.dtype = torch.bfloat16) -> Heads:
    """Query, key and value as projections hand them out."""
    generator = torch.Generator().manual_seed(Q * 1000 + D)
    sizes = ((H, Q), (G, K), (G, K))
    query, key, value = (torch.randn(B, S, N, D, generator=generator).to(dtype).transpose(1, 2) for N, S in sizes)
    return query, key, value


def exact(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention by its definition; zeros for queries that see nothing."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.mT * scale).masked_fill(~seen, -torch.inf)
    prob = torch.softmax(scores, dim=-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return (prob @ value).transpose(1, 2)


def relative(found: Tensor, wanted: Tensor, least: float = 1e-30) -> float:
    """The largest error in units of the largest value, or of `least` where that is more."""
    return float((found.detach().double() - wanted).abs().max() / wanted.abs().max().clamp(min=least))


def check(problem: Heads, mask: Tensor | None, causal: bool, scale: float | None = None) -> None:
    """Output and all gradients against float64."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in problem)
    out = fused.attention(query, key, value, mask, causal=causal, scale=scale)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    grads = torch.autograd.grad(out, (query, key, value), seed)
    wide = [tensor.detach().double().requires_grad_() for tensor in problem]
    Q, K = query.shape[2], key.shape[2]
    seen = torch.ones(1, 1, Q, K, dtype=torch.bool) if mask is None else mask
    seen = seen.tril() if causal and mask is None else seen
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    wanted = exact(*wide, seen, scale)
    expected = torch.autograd.grad(wanted, wide, seed.double())
    tolerance = TOLERANCE[query.dtype]
    assert out.shape == wanted.shape and out.dtype == query.dtype and relative(out, wanted.detach()) <= tolerance
    for found, right, like in zip(grads, expected, problem, strict=True):
        # A softmax over few keys has hardly a gradient but the rounding of its terms: scale times a sum over the width.
        assert found.dtype == like.dtype and relative(found, right, max(1.0, scale * width**0.5)) <= tolerance


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    length=st.integers(1, 150),
    more=st.integers(0, 70),
    width=st.integers(1, 80),
    how=st.sampled_from(["causal", "whole", "mask"]),
)
def test_attention_equals_float64(
    level: str, sizes: tuple[int, int, int], length: int, more: int, width: int, how: str
) -> None:
    B, G, group = sizes
    keys = length if how == "causal" else length + more
    problem = heads(B, G * group, G, length, keys, width)
    mask = None
    if how == "mask":
        mask = torch.rand(B, 1, length, keys, generator=torch.Generator().manual_seed(length)) < 0.3
        mask[:, :, length // 2] = False
    with native.at_most(level):
        check(problem, mask, how == "causal", 0.3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_usual_heads(level: str, width: int) -> None:
    with native.at_most(level):
        check(heads(2, 4, 2, 130, 130, width), None, causal=True)


def test_float32_is_exact() -> None:
    check(heads(2, 4, 2, 70, 70, 24, torch.float32), None, causal=True)


def packed_mask(borders: list[int], length: int, window: int | None = None) -> Tensor:
    """Causal within rows that begin at the borders, optionally within a window."""
    position = torch.arange(length)
    row = torch.bucketize(position, torch.tensor(borders), right=True)
    near = position[:, None] - position[None] < (window or length)
    return ((row[:, None] == row[None]) & near).tril().expand(2, 1, -1, -1)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("level", LEVELS[-2:])
def test_packed_rows(level: str, window: int | None) -> None:
    with native.at_most(level):
        check(heads(2, 4, 2, 200, 200, 32), packed_mask([10, 64, 130, 131], 200, window), causal=False)


@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_a_packed_sequence_do_not_touch_one_another(level: str) -> None:
    query, key, value = heads(2, 2, 2, 150, 150, 32)
    mask = packed_mask([70], 150)
    with native.at_most(level):
        before = fused.attention(query, key, value, mask)
        for tensor in (query, key, value):
            tensor[:, :, :70] = torch.randn_like(tensor[:, :, :70]) * 10
        after = fused.attention(query, key, value, mask)
    assert torch.equal(before[:, 70:], after[:, 70:]) and not torch.equal(before[:, :70], after[:, :70])


@pytest.mark.parametrize("level", LEVELS[-2:])
def test_a_mask_that_is_causal_gives_what_causal_gives(level: str) -> None:
    problem = heads(1, 3, 3, 90, 90, 40)
    with native.at_most(level):
        causal = fused.attention(*problem, causal=True)
        masked = fused.attention(*problem, torch.ones(1, 1, 90, 90, dtype=torch.bool).tril())
    assert torch.equal(causal, masked)


@pytest.mark.parametrize("level", LEVELS[-2:])
def test_loud_scores_do_not_overflow(level: str) -> None:
    query, key, value = heads(1, 1, 1, 70, 70, 16)
    query, key, value = ((tensor * factor).requires_grad_() for tensor, factor in ((query, 30), (key, 30), (value, 1)))
    with native.at_most(level):
        out = fused.attention(query, key, value, causal=True, scale=1.0)
        grads = torch.autograd.grad(out.float().sum(), (query, key, value))
    wide = (tensor.detach().double() for tensor in (query, key, value))
    assert relative(out.detach(), exact(*wide, torch.ones(1, 1, 70, 70, dtype=torch.bool).tril(), 1.0)) <= 2e-2
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_same_bits_whatever_the_grad_mode_and_the_threads() -> None:
    problem = heads(2, 4, 2, 100, 100, 32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(fused.attention(*problem, causal=True))
            results.append(fused.attention(*(tensor.requires_grad_() for tensor in problem), causal=True).detach())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_memory_is_linear_in_the_length() -> None:
    """What the operator saves: its arguments, its output, and a number for each query and head."""
    query, key, value = (tensor.requires_grad_() for tensor in heads(1, 2, 2, 64, 64, 32))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.attention(query, key, value, causal=True)
    assert sum(tensor.numel() for tensor in saved) == 4 * query.numel() + 2 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_passes_opcheck(dtype: torch.dtype) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in heads(2, 4, 2, 9, 9, 8, dtype))
    torch.library.opcheck(torch.ops.finetune.attention, (query, key, value, None, True, 0.5))
    mask = torch.rand(2, 1, 9, 9) < 0.7
    torch.library.opcheck(torch.ops.finetune.attention, (query, key, value, mask | torch.eye(9).bool(), False, 0.5))


def test_attention_compiles_without_a_break() -> None:
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fused.attention(query, key, value, causal=True).float().sum()

    problem = [tensor.requires_grad_() for tensor in heads(1, 2, 1, 20, 20, 16)]
    grads = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*problem), problem)
    for found, wanted in zip(grads, torch.autograd.grad(step(*problem), problem), strict=True):
        assert torch.equal(found, wanted)


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value = heads(1, 3, 2, 4, 4, 8)
    with pytest.raises(ValueError, match="attention of"):
        fused.attention(query, key, value, causal=True)
    with pytest.raises(ValueError, match="causal=True"):
        fused.attention(query[:, :2, :3], key, value, causal=True)


def test_the_reference_is_what_serves_elsewhere() -> None:
    """On tensors that the compiled kernels do not take the operator still answers, by the reference."""
    problem = heads(1, 2, 2, 5, 5, 300)
    found = fused.attention(*problem, causal=True)
    wanted, _ = attention.reference(*problem, None, True, 300**-0.5)
    assert torch.equal(found, wanted)

"""The operator of LoRA: torch's own checks, float64 algebra, what it saves, dropout, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import finetune.quant.dense  # noqa: F401  (makes its format known)
from finetune.kernels import ops, reference
from finetune.kernels.dropout import draw_kept, zero_dropped
from finetune.kernels.lora import lora_linear
from finetune.kernels.operand import Operand

OUT, IN, RANK, SCALING = 24, 48, 4, 0.75
assert ops  # registers the 4-bit formats
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def operand_of(kind: str, out: int = OUT, width: int = IN) -> tuple[Operand, Tensor]:
    """A frozen weight in a format, and the dense weight it stands for."""
    w = torch.randn(out, width, generator=torch.Generator().manual_seed(1))
    if kind == "dense":
        return Operand([w], "dense", out, width), w
    packed = reference.quantize_4bit(w, kind, 64, kind == "nf4")
    dense = reference.dequantize_4bit(packed, kind, 64, list(w.shape), torch.float32)
    return Operand([t for t in packed if t is not None], f"codebook4:{kind}:64", out, width), dense


def factors(dtype: torch.dtype = torch.float32, out: int = OUT, width: int = IN) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(RANK, width, generator=generator), torch.randn(out, RANK, generator=generator)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def relative(found: Tensor | None, exact: Tensor) -> float:
    assert found is not None
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kept", [False, True], ids=["all", "dropout"])
@pytest.mark.parametrize(
    ("dtype", "trained"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "mixed", "bf16"],
)
@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4"])
def test_opcheck(kind: str, dtype: torch.dtype, trained: torch.dtype, kept: bool) -> None:
    base, _ = operand_of(kind)
    x = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)
    bias = torch.randn(OUT, dtype=dtype, requires_grad=True)
    bits = draw_kept(x, 0.5) if kept else None
    torch.library.opcheck(
        torch.ops.finetune.lora_linear,
        (x, bias, base.tensors, base.spec, OUT, *factors(trained), SCALING, bits),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


def exact(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of x, A, B for a gradient of ones times the output's own index, in float64."""
    x, a, b = (t.detach().double().requires_grad_() for t in (x, a, b))
    y = x @ w.double().T + SCALING * (x @ a.T) @ b.T + (0 if bias is None else bias.double())
    y.backward(slope(y))
    return y.detach(), x.grad, a.grad, b.grad  # type: ignore[return-value]


def summands(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The same with every term of the sums taken as positive: what rounding errors are a share of, terms that cancel
    or not."""
    x, w, a, b = (t.detach().double().abs() for t in (x, w, a, b))
    y = x @ w.T + SCALING * (x @ a.T) @ b.T + (0 if bias is None else bias.double().abs())
    g, x_NI = slope(y).abs().reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    grad_x = (g @ (w + SCALING * b @ a)).view_as(x)
    return y, grad_x, SCALING * (g @ b).T @ x_NI, SCALING * g.T @ (x_NI @ a.T)


def slope(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    out=st.integers(1, 40),
    width=st.integers(1, 70),
    kind=st.sampled_from(["dense", "nf4"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    trained=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
)
def test_equals_float64_algebra(
    rows: list[int], out: int, width: int, kind: str, dtype: torch.dtype, trained: torch.dtype, biased: bool
) -> None:
    base, w = operand_of(kind, out, width)
    a, b = factors(trained, out, width)
    x = torch.randn(*rows, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(out, dtype=dtype) if biased else None
    y = lora_linear(x, bias, base, a, b, SCALING)
    y.backward(slope(y.detach()))
    wanted, sizes = exact(x, w, bias, a, b), summands(x, w, bias, a, b)
    tolerance = 1e-6 if dtype == torch.float32 and trained == torch.float32 else 2.0**-7
    for name, found, right, size in zip("yxab", (y.detach(), x.grad, a.grad, b.grad), wanted, sizes, strict=True):
        assert found is not None and found.dtype == (trained if name in "ab" else dtype)
        assert found.shape == right.shape and found.is_contiguous()
        assert (found.double() - right).norm() <= tolerance * size.norm() + 1e-6, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_starts_as_the_base_bit_for_bit_whatever_the_grad_mode(kind: str, dtype: torch.dtype) -> None:
    base, w = operand_of(kind)
    a, b = factors()
    b.data.zero_()
    x, bias = torch.randn(3, 7, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    plain = F.linear(x, w.to(dtype), bias)
    with torch.no_grad():
        quiet = lora_linear(x, bias, base, a, b, SCALING)
    with torch.inference_mode():
        inference = lora_linear(x, bias, base, a, b, SCALING).clone()
    recorded = lora_linear(x.clone().requires_grad_(), bias, base, a, b, SCALING)
    for found in (quiet, inference, recorded):
        assert torch.equal(found, plain)


def test_frozen_parts_get_no_gradient() -> None:
    base, _ = operand_of("nf4")
    a, b = factors()
    x = torch.randn(5, IN)
    lora_linear(x, None, base, a.detach(), b, SCALING).sum().backward()
    assert b.grad is not None and a.grad is None
    assert not lora_linear(x, None, base, a.detach(), b.detach(), SCALING).requires_grad
    bias = torch.randn(OUT, requires_grad=True)
    lora_linear(x, bias, base, a, b, SCALING).sum().backward()
    assert torch.equal(bias.grad, torch.full((OUT,), 5.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_keeps_nothing_but_x_the_small_product_and_bits(dropout: float) -> None:
    base, _ = operand_of("nf4")
    a, b = factors()
    x = torch.randn(64, IN, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, None, base, a, b, SCALING, dropout=dropout)
    known = {t.untyped_storage().data_ptr() for t in (x, a, b, *base.tensors)}
    own = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    small = 64 * RANK * 2 + (64 * IN // 8 if dropout else 0)
    assert sum(t.numel() * t.element_size() for t in own) == small


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_under_dropout_are_those_of_what_was_kept(dtype: torch.dtype) -> None:
    base, w = operand_of("dense")
    a, b = factors()
    x = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    y = lora_linear(x, None, base, a, b, SCALING, dropout=0.25)
    y.backward(slope(y.detach()))
    torch.manual_seed(4)
    mask = zero_dropped(torch.ones_like(x), draw_kept(x, 0.25)).detach().double() / 0.75
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    right = x64 @ w.double().T + SCALING * ((x64 * mask) @ a64.T) @ b64.T
    right.backward(slope(right.detach()))
    for found, wanted in ((y, right), (x.grad, x64.grad), (a.grad, a64.grad), (b.grad, b64.grad)):
        assert wanted is not None and relative(found, wanted) < TOLERANCE[dtype]


def test_recomputed_activations_drop_the_same() -> None:
    base, _ = operand_of("nf4")
    a, b = factors()
    x = torch.randn(6, IN, requires_grad=True)

    def gradient(recompute: bool) -> Tensor:
        torch.manual_seed(5)

        def run(x: Tensor) -> Tensor:
            return lora_linear(x, None, base, a, b, SCALING, dropout=0.5).tanh()

        y = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        (grad,) = torch.autograd.grad(y.sum(), a)
        return grad

    assert torch.equal(gradient(True), gradient(False))


def test_autocast_casts_once_and_outside_the_operator() -> None:
    base, _ = operand_of("dense")
    a, b = factors()
    x, bias = torch.randn(4, IN, requires_grad=True), torch.randn(OUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, bias, base, a, b, SCALING)
        raw, _ = torch.ops.finetune.lora_linear(x, bias, base.tensors, base.spec, OUT, a, b, SCALING, None)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and raw.dtype == torch.float32
    assert torch.equal(y, lora_linear(x.bfloat16(), bias.bfloat16(), base, a, b, SCALING))
    assert x.grad is not None and x.grad.dtype == a.grad.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_compiles_without_a_break(kind: str, dropout: float) -> None:
    base, _ = operand_of(kind)
    a, b = factors()
    x = torch.randn(3, IN, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return lora_linear(x * 2, None, base, a, b, SCALING, dropout=dropout).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    found = torch.autograd.grad(y.sum(), (x, a, b))
    assert all(torch.isfinite(grad).all() for grad in found)
    if not dropout:
        for grad, wanted in zip(found, torch.autograd.grad(run(x).sum(), (x, a, b)), strict=True):
            assert torch.allclose(grad, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 0, IN), (1, 1, 2, IN)])
def test_any_leading_dimensions_and_strides(shape: tuple[int, ...]) -> None:
    base, w = operand_of("nf4")
    a, b = factors()
    for x in (torch.randn(shape), torch.randn(shape[::-1]).permute(*range(len(shape)))[::1]):
        x = x if x.shape == torch.Size(shape) else x.permute(*reversed(range(x.dim())))
        x = x.requires_grad_()
        y = lora_linear(x, None, base, a, b, SCALING)
        assert torch.allclose(y, x @ (w + SCALING * b @ a).T, atol=1e-4)
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape

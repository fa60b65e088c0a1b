"""The operators: torch's own checks, gradients against float64 algebra, and what they save."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from finetune.kernels import int8, ops, reference

OUT, IN = 24, 48


def packed_weight(double_quant: bool = True, shape: tuple[int, int] = (OUT, IN)) -> tuple[tuple, Tensor]:
    """Storage as the operators take it, and the weight it decodes to."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = reference.quantize_4bit(w, "nf4", 64, double_quant)
    return (*packed, "nf4", 64), reference.dequantize_4bit(packed, "nf4", 64, list(shape), torch.float32)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_dequantize_passes_opcheck(double_quant: bool) -> None:
    storage, _ = packed_weight(double_quant)
    torch.library.opcheck(torch.ops.finetune.dequantize_4bit, (*storage, [OUT, IN], torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_linear_passes_opcheck(double_quant: bool, bias: bool, dtype: torch.dtype) -> None:
    storage, _ = packed_weight(double_quant)
    x = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)
    b = torch.randn(OUT, dtype=dtype, requires_grad=True) if bias else None
    torch.library.opcheck(torch.ops.finetune.linear_4bit, (x, b, *storage, OUT))


def test_linear_passes_opcheck_on_a_strided_input() -> None:
    storage, _ = packed_weight()
    x = torch.randn(IN, 5, 2).permute(2, 1, 0).requires_grad_()
    torch.library.opcheck(torch.ops.finetune.linear_4bit, (x, None, *storage, OUT))


def test_forward_and_gradient_equal_float64_algebra() -> None:
    storage, w = packed_weight()
    x = torch.randn(3, 7, IN, requires_grad=True)
    b = torch.randn(OUT, requires_grad=True)
    seed = torch.randn(3, 7, OUT)
    y = ops.linear_4bit(x, b, *storage, OUT)
    y.backward(seed)
    exact = x.detach().double() @ w.double().T + b.detach().double()
    assert relative(y, exact) < 1e-5
    assert relative(x.grad, seed.double() @ w.double()) < 1e-5
    assert relative(b.grad, seed.double().sum((0, 1))) < 1e-5


def relative(found: Tensor | None, exact: Tensor) -> float:
    assert found is not None
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_a_frozen_input_gets_no_graph_and_the_bits_do_not_depend_on_the_grad_mode() -> None:
    storage, _ = packed_weight()
    x = torch.randn(5, IN)
    plain = ops.linear_4bit(x, None, *storage, OUT)
    assert plain.grad_fn is None
    with torch.no_grad():
        quiet = ops.linear_4bit(x.clone().requires_grad_(), None, *storage, OUT)
    with torch.inference_mode():
        inference = ops.linear_4bit(x, None, *storage, OUT)
    graph = ops.linear_4bit(x.clone().requires_grad_(), None, *storage, OUT)
    assert torch.equal(plain, quiet) and torch.equal(plain, graph) and torch.equal(plain, inference.clone())


def test_only_packed_tensors_are_kept_for_the_backward() -> None:
    storage, _ = packed_weight()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.linear_4bit(torch.randn(4, IN, requires_grad=True), None, *storage, OUT)
    assert kept and {id(t.untyped_storage()) for t in kept} == {id(t.untyped_storage()) for t in storage[:4]}
    assert sum(t.numel() * t.element_size() for t in kept) < OUT * IN


def test_gradients_are_the_same_after_an_evaluation_pass() -> None:
    storage, _ = packed_weight()
    x = torch.randn(4, IN, dtype=torch.bfloat16)

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        ops.linear_4bit(leaf, None, *storage, OUT).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    before = gradient()
    with torch.no_grad():
        ops.linear_4bit(x, None, *storage, OUT)
    assert torch.equal(before, gradient())


def test_autocast_casts_once_and_outside_the_operator() -> None:
    storage, w = packed_weight()
    x, b = torch.randn(4, IN), torch.randn(OUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.linear_4bit(x, b, *storage, OUT)
        raw = torch.ops.finetune.linear_4bit(x, b, *storage, OUT)
        expected = torch.nn.functional.linear(x, w, b)
    assert cast.dtype == torch.bfloat16 and torch.equal(cast, expected)
    assert raw.dtype == torch.float32 and torch.equal(raw, torch.nn.functional.linear(x, w, b))


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 0, IN), (1, 1, 2, IN)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    storage, w = packed_weight()
    x = torch.randn(shape, requires_grad=True)
    y = ops.linear_4bit(x, None, *storage, OUT)
    assert torch.equal(y, torch.nn.functional.linear(x, w))
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


DECODER_ONLY = """
import torch
from finetune.kernels import int8, ops, reference

w = torch.randn(24, 48)
storage = (*reference.quantize_4bit(w, "nf4", 64, True), "nf4", 64)
calls = []


def decode(*arguments):
    calls.append("decode")
    return w.clone()


torch.library.impl("finetune::dequantize_4bit", "cpu")(decode)
x = torch.randn(3, 48, requires_grad=True)
ops.linear_4bit(x, None, *storage, 24).sum().backward()
assert calls == ["decode", "decode"], calls
"""


def test_a_backend_that_only_decodes_serves_the_product_as_well() -> None:
    """In a process of its own: registrations cannot be taken back, and the compiled kernels would go before."""
    environment = {**os.environ, "FINETUNE_CPU": "off"}
    subprocess.run([sys.executable, "-c", DECODER_ONLY], env=environment, check=True)


def test_second_derivatives_are_right() -> None:
    storage, w = packed_weight()
    x = torch.randn(3, IN, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.linear_4bit(x, None, *storage, OUT).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert relative(second, 2 * torch.ones(3, IN).double() @ w.double().T @ w.double()) < 1e-5


@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("threshold", [0.0, 2.0], ids=["weight-only", "outliers"])
def test_models_may_add_to_outputs_in_place(bias: bool, threshold: float) -> None:
    """As Falcon's blocks do with what their feed-forward gives: no operator's output is a view."""
    storage, _ = packed_weight()
    rows = int8.quantize_weight(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2)))
    for shape in ((5, IN), (2, 5, IN)):
        x, b = torch.randn(shape, requires_grad=True), torch.randn(OUT) if bias else None
        for y in (
            ops.linear_4bit(x, b, *storage, OUT),
            int8.linear_int8(x, b, rows.codes_MI, rows.absmax_M, threshold),
        ):
            y += 1
            y.sum().backward()
            assert x.grad is not None and x.grad.abs().max() > 0
            x.grad = None

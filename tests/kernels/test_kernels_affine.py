"""Affine integer codes: packing, decoding on every level, products and gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.kernels import affine, native, operand
from finetune.kernels.operand import Operand
from finetune.kernels.operand_linear import operand_linear

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
KINDS = ("none", "integer", "real")

shapes = st.tuples(st.integers(1, 40), st.integers(1, 200))
storages = st.tuples(st.sampled_from(affine.BITS), st.sampled_from([-1, 32, 64, 128]), st.sampled_from(KINDS))


def stored(shape: tuple[int, ...], bits: int, group_size: int, kind: str, half: bool = True, seed: int = 0) -> Any:
    """Random codes, scales and zero points, and the float64 weight they stand for, group by group."""
    make = torch.Generator().manual_seed(seed)
    *rows, width = shape
    codes = torch.randint(0, 2**bits, shape, generator=make, dtype=torch.uint8)
    sizes = (*rows, affine.groups(width, group_size))
    scale = torch.rand(sizes, generator=make) + 0.1
    scale = scale.half() if half else scale
    zero = None
    if kind == "integer":
        zero = torch.randint(0, 2**bits, sizes, generator=make, dtype=torch.uint8)
    elif kind == "real":
        zero = torch.randn(sizes, generator=make)
    exact = torch.empty(shape, dtype=torch.float64)
    for column in range(width):
        group = 0 if group_size < 0 else column // group_size
        code, unit = codes[..., column].double(), scale[..., group].double()
        if kind == "real":
            exact[..., column] = code * unit + zero[..., group].double()
        else:
            middle = 2.0 ** (bits - 1) if zero is None else zero[..., group].double()
            exact[..., column] = (code - middle) * unit
    return [affine.pack(codes, bits), scale, zero, bits, group_size], exact


@given(shapes, st.sampled_from(affine.BITS))
@settings(max_examples=60, deadline=None)
def test_packing_is_undone_and_has_the_documented_layout(shape: tuple[int, int], bits: int) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = affine.pack(codes, bits)
    assert packed.shape == (shape[0], affine.packed_width(shape[1], bits)) and packed.dtype == torch.uint8
    assert torch.equal(affine.unpack(packed, bits, shape[1]), codes)
    row = int.from_bytes(bytes(packed[0].tolist()), "little")
    assert [row >> bits * i & 2**bits - 1 for i in range(shape[1])] == codes[0].tolist()


@given(shapes, storages, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=150, deadline=None)
def test_decoding_has_the_same_bits_on_every_level(
    shape: tuple[int, int], storage: tuple[int, int, str], half: bool, dtype: torch.dtype
) -> None:
    weight, exact = stored(shape, *storage, half)
    reference = affine.reference_dequantize(*weight, list(shape), torch.float32)
    torch.testing.assert_close(reference.double(), exact, rtol=1e-6, atol=1e-5)
    for level in native.LEVELS:
        with native.at_most(level):
            assert torch.equal(affine.dequantize_affine(*weight, list(shape), dtype), reference.to(dtype)), level


def test_tiny_scales_and_zero_points_do_not_vanish() -> None:
    """Numbers below 2^-126 are zero to the CPU's own rounding to bf16."""
    for bits, kind in ((8, "none"), (8, "real"), (4, "integer"), (3, "real")):
        weight, _ = stored((4, 64), bits, 32, kind, half=False)
        weight[1] = weight[1] * 1e-39
        weight[2] = weight[2] * 1e-39 if kind == "real" else weight[2]
        expected = affine.reference_dequantize(*weight, [4, 64], torch.bfloat16)
        assert expected.count_nonzero() > 100
        for level in native.LEVELS:
            with native.at_most(level):
                assert torch.equal(affine.dequantize_affine(*weight, [4, 64], torch.bfloat16), expected)


@given(st.integers(1, 70), shapes, storages, st.sampled_from(list(TOLERANCE)), st.booleans())
@settings(max_examples=80, deadline=None)
def test_products_are_those_of_the_decoded_weight(
    rows: int, shape: tuple[int, int], storage: tuple[int, int, str], dtype: torch.dtype, with_bias: bool
) -> None:
    weight, _ = stored(shape, *storage)
    make = torch.Generator().manual_seed(1)
    x = torch.randn(rows, shape[1], generator=make).to(dtype)
    grad = torch.randn(rows, shape[0], generator=make).to(dtype)
    bias = torch.randn(shape[0], generator=make).to(dtype) if with_bias else None
    exact = affine.reference_dequantize(*weight, list(shape), dtype).double()
    for level in ("scalar", "avx512_bf16", "amx"):
        with native.at_most(level):
            leaf = x.clone().requires_grad_()
            y = affine.linear_affine(leaf, bias, *weight, shape[0])
            with torch.no_grad():
                assert torch.equal(affine.linear_affine(x, bias, *weight, shape[0]), y)
            y.backward(grad)
        added = 0 if bias is None else bias.double()
        assert_near(y.detach(), x.double() @ exact.T + added, x.double().abs() @ exact.abs().T)
        assert_near(leaf.grad, grad.double() @ exact, grad.double().abs() @ exact.abs())


def assert_near(found: Tensor | None, exact: Tensor, magnitude: Tensor) -> None:
    """Within the dtype's tolerance of the sum of magnitudes, which bounds what rounding can do."""
    assert found is not None
    assert ((found.double() - exact).abs() <= TOLERANCE[found.dtype] * (magnitude + 1)).all()


def test_weight_only_gradient_is_float64s_on_the_decoded_base() -> None:
    weight, exact = stored((96, 300), 4, 64, "integer")
    x = torch.randn(20, 300, requires_grad=True)
    affine.linear_affine(x, None, *weight, 96).square().sum().backward()
    expected = 2 * (x.double() @ exact.T) @ exact
    assert (x.grad.double() - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(("bits", "kind"), [(8, "none"), (4, "integer"), (3, "real")])
def test_opcheck(bits: int, kind: str) -> None:
    weight, _ = stored((6, 40), bits, 32, kind)
    x, grad = torch.randn(2, 3, 40, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    ops = torch.ops.finetune
    torch.library.opcheck(ops.dequantize_affine.default, (*weight, [6, 40], torch.bfloat16))
    torch.library.opcheck(ops.linear_affine.default, (x, bias, *weight, 6))
    torch.library.opcheck(ops.input_gradient_affine.default, (grad, *weight, 40))


@pytest.mark.parametrize("kind", KINDS)
def test_as_an_operand_it_multiplies_and_records_likewise(kind: str) -> None:
    weight, _ = stored((6, 40), 3, 32, kind)
    one = Operand([t for t in weight[:3] if t is not None], "affine:3:32", 6, 40)
    x, bias = torch.randn(4, 40), torch.randn(6)
    y = affine.linear_affine(x, bias, *weight, 6)
    assert torch.equal(operand.linear(x, bias, one.tensors, one.spec, 6), y)
    leaf, free = x.clone().requires_grad_(), bias.clone().requires_grad_()
    recorded = operand_linear(leaf, free, one)
    assert torch.equal(recorded, y)
    recorded.sum().backward()
    assert torch.equal(leaf.grad, operand.input_gradient(torch.ones(4, 6), one.tensors, one.spec, 40))
    assert torch.equal(free.grad, torch.full((6,), 4.0))
    torch.library.opcheck(torch.ops.finetune.operand_linear.default, (leaf, free, one.tensors, one.spec, 6))


def test_autocast_casts_the_input_only() -> None:
    weight, _ = stored((6, 40), 4, 32, "integer")
    x = torch.randn(4, 40, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = affine.linear_affine(x, torch.randn(6), *weight, 6)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_compiles_without_a_graph_break() -> None:
    weight, _ = stored((6, 40), 4, 32, "integer")
    compiled = torch.compile(lambda x: affine.linear_affine(x, None, *weight, 6), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 40, requires_grad=True)
    assert torch.equal(compiled(x), affine.linear_affine(x, None, *weight, 6))
    compiled(x).sum().backward()

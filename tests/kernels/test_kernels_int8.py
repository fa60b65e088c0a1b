"""Row-wise int8 and LLM.int8(): codes, absmax, outliers and int32 products are those of bitsandbytes."""

from __future__ import annotations

import subprocess
import sys

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.kernels import cpu_int8, int8, native

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
shapes = st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(1, 200))


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32, outliers: int = 0, seed: int = 0) -> Tensor:
    """Rows with some columns of large values."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:, :outliers] *= 10
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_have_the_bits_of_bitsandbytes(dtype: torch.dtype) -> None:
    w = inputs(96, 320, dtype)
    w[3] = 0
    codes, absmax, _ = bnb.int8_vectorwise_quant(w.half())
    mine = int8.quantize_weight(w)
    keep = torch.arange(96) != 3  # theirs divides by zero
    assert torch.equal(mine.codes_MI[keep], codes[keep]) and torch.equal(mine.absmax_M, absmax)
    assert not mine.codes_MI[3].any()
    decoded = int8.dequantize_int8(mine.codes_MI, mine.absmax_M, [96, 320], torch.float32)
    torch.testing.assert_close(decoded, bnb.int8_vectorwise_dequant(mine.codes_MI, absmax), rtol=3e-7, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0, 100.0])
def test_inputs_have_the_bits_of_bitsandbytes(rows: int, threshold: float) -> None:
    x = inputs(rows, 257, torch.float16, outliers=5)
    codes, absmax, columns = bnb.int8_vectorwise_quant(x.clone(), threshold)
    mine = int8.quantize_rows(x, threshold)
    expected = codes.clone()
    if columns is not None and len(columns):
        expected[:, columns] = 0  # what one row has there anyway
    assert torch.equal(mine.codes_MI, expected) and torch.equal(mine.absmax_M, absmax)
    if threshold:
        assert mine.outlier_I.nonzero().view(-1).tolist() == columns.tolist()
        assert 0 < len(columns) < 100 or threshold == 100.0
    for level in native.LEVELS:
        with native.at_most(level):
            c, a, o, count = cpu_int8.quantize_rows(x, threshold) if native.library() else _as_native(mine)
            assert torch.equal(c, expected) and torch.equal(a, absmax) and count == o.sum()
            assert torch.equal(o.bool(), mine.outlier_I if threshold else torch.zeros(257, dtype=torch.bool))


def _as_native(rows: int8.Rows) -> tuple[Tensor, Tensor, Tensor, int]:
    marks = torch.zeros(rows.codes_MI.shape[1]) if rows.outlier_I is None else rows.outlier_I
    return rows.codes_MI, rows.absmax_M, marks.to(torch.uint8), int(marks.sum())


@given(shapes, st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_products_are_exact(shape: tuple[int, int, int], extreme: int) -> None:
    rows, out_features, width = shape[0], shape[1], shape[2] if shape[2] < 20 else shape[2] * 11
    make = torch.Generator().manual_seed(rows)
    low = 127 if extreme else -127
    x = torch.randint(low, 128, (rows, width), generator=make, dtype=torch.int8)
    w = torch.randint(low, 128, (out_features, width), generator=make, dtype=torch.int8)
    exact = x.long() @ w.long().T
    assert torch.equal(int8.product(x, w).long(), exact)
    for level in native.LEVELS if native.library() else ():
        with native.at_most(level):
            assert torch.equal(cpu_int8.product(x, w, int8.product).long(), exact)


def test_a_vendor_that_saturates_is_found_out() -> None:
    """oneDNN without VNNI adds pairs of int8 products in 16 bits: 127 x 127 x 2 does not fit."""
    if native.library() is None:
        pytest.skip("the compiled kernels are off")
    script = (
        "import torch; from finetune.kernels import cpu_int8, int8\n"
        "x = torch.full((70, 300), 127, dtype=torch.int8)\n"
        "y = cpu_int8.product(x, x, int8.product); assert (y == 127 * 127 * 300).all()"
    )
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", "FINETUNE_CPU": "avx2", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    environment["PYTHONPATH"] = ":".join(sys.path)
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@given(shapes, st.sampled_from(list(TOLERANCE)), st.sampled_from([1e-6, 2.0, 6.0]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_level_has_the_bits_of_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, threshold: float, with_bias: bool
) -> None:
    rows, out_features, width = shape
    x = inputs(rows, width, dtype, outliers=3) * 2
    x[0] = 0
    bias = torch.randn(out_features).to(dtype) if with_bias else None
    weight = int8.quantize_weight(inputs(out_features, width, seed=1))[:2]
    expected = int8.reference_llm_int8(x, bias, *weight, threshold)
    for level in native.LEVELS:
        with native.at_most(level):
            assert torch.equal(int8.linear_int8(x, bias, *weight, threshold), expected), level


@given(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=60, deadline=None)
def test_decoding_has_the_same_bits_on_every_level(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    _, out_features, width = shape
    codes, absmax, _ = int8.quantize_weight(inputs(out_features, width))
    expected = int8.decode(codes, absmax).to(dtype)
    for level in native.LEVELS:
        with native.at_most(level):
            assert torch.equal(int8.dequantize_int8(codes, absmax, [out_features, width], dtype), expected), level


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_weight_only_products_are_those_of_the_decoded_weight(level: str, dtype: torch.dtype) -> None:
    codes, absmax, _ = int8.quantize_weight(inputs(70, 333) * 0.05)
    exact = int8.decode(codes, absmax).to(dtype).double()
    for rows in (1, 5, 40):
        x, grad = inputs(rows, 333, dtype).requires_grad_(), inputs(rows, 70, dtype)
        with native.at_most(level):
            y = int8.linear_int8(x, None, codes, absmax)
            y.backward(grad)
        for found, expected in ((y.detach(), x.detach().double() @ exact.T), (x.grad, grad.double() @ exact)):
            assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_outlier_columns_are_kept_in_full() -> None:
    """The paper's point (section 3.2); 3 of 128 columns, relative error .020 without, .007 with a threshold of 6."""
    x, w = inputs(64, 128, outliers=3), inputs(48, 128, seed=1)
    weight = int8.quantize_weight(w)[:2]
    decoded = int8.decode(*weight).double()
    exact = x.double() @ decoded.T

    def error(threshold: float) -> float:
        return float((int8.linear_int8(x, None, *weight, threshold).double() - exact).norm() / exact.norm())

    assert error(6.0) < 0.5 * error(1e9)
    assert error(1e-9) < 1e-5  # all columns are outliers: nothing is rounded
    half = int8.linear_int8(x.half(), None, *weight, 6.0).double()
    assert (half - exact).norm() < 1e-2 * exact.norm()


def test_output_is_bitsandbytes_but_for_its_constant() -> None:
    x, w = inputs(16, 256, torch.float16, outliers=2), inputs(64, 256, seed=1)
    codes, absmax, _ = int8.quantize_weight(w)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x, *bnb.int8_vectorwise_quant(x.clone(), 6.0)[:1], codes, bnb.int8_vectorwise_quant(x.clone(), 6.0)[1], absmax,
        bnb.int8_vectorwise_quant(x.clone(), 6.0)[2],
    )  # fmt: skip
    mine = int8.linear_int8(x, None, codes, absmax, 6.0).double()
    assert (mine - theirs.double()).norm() < 2e-3 * mine.norm()


def test_the_gradient_is_straight_through() -> None:
    """Float64 with the same codes and the same outlier columns, the rounding of the input taken for the identity."""
    x = inputs(9, 200, outliers=4).requires_grad_()
    codes, absmax, _ = int8.quantize_weight(inputs(50, 200, seed=1))
    bias = torch.randn(50, requires_grad=True)
    y = int8.linear_int8(x, bias, codes, absmax, 6.0)
    (y * torch.arange(50)).sum().backward()
    grad = torch.arange(50).double().expand(9, 50)
    decoded = codes.double() * absmax.double().unsqueeze(1) / 127
    assert ((x.grad.double() - grad @ decoded).norm() / (grad @ decoded).norm()) < 1e-5
    assert torch.equal(bias.grad, 9.0 * torch.arange(50))
    rows = int8.quantize_rows(x, 6.0)
    near = rows.codes_MI.double() @ codes.double().T * torch.outer(rows.absmax_M, absmax).double() / 127**2
    far = x.detach().double()[:, rows.outlier_I] @ decoded[:, rows.outlier_I].T
    torch.testing.assert_close(y.detach().double(), near + far + bias.detach(), rtol=1e-5, atol=1e-4)


def test_opcheck() -> None:
    codes, absmax, _ = int8.quantize_weight(inputs(6, 40))
    x, grad = torch.randn(2, 3, 40, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    ops = torch.ops.finetune
    torch.library.opcheck(ops.dequantize_int8.default, (codes, absmax, [6, 40], torch.bfloat16))
    torch.library.opcheck(ops.linear_int8.default, (x, bias, codes, absmax, 6))
    torch.library.opcheck(ops.input_gradient_int8.default, (grad, codes, absmax, 40))
    torch.library.opcheck(ops.llm_int8.default, (x, bias, codes, absmax, 1.0))


def test_empty_inputs_and_transposed_storage() -> None:
    codes, absmax, _ = int8.quantize_weight(inputs(6, 40))
    assert int8.linear_int8(torch.randn(0, 40), None, codes, absmax, 6.0).shape == (0, 6)
    assert int8.linear_int8(torch.randn(0, 40), None, codes, absmax).shape == (0, 6)
    x = torch.randn(40, 5).T
    turned = codes.T.contiguous().T
    assert torch.equal(int8.linear_int8(x, None, turned, absmax, 2.0), int8.linear_int8(x, None, codes, absmax, 2.0))

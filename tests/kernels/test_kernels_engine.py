"""The compiled product engines over a dense weight, against float64, at every level and on shapes that fit nothing."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.kernels import native

pytestmark = pytest.mark.skipif(native.why_off() is not None, reason=str(native.why_off()))

ENGINES = ("avx512_bf16", "amx")
GUARD = 64
"""Elements behind every result that no engine may touch."""


def sizes(*shape: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in shape]


def served(level: str) -> None:
    """Skip where the CPU is below `level`."""
    with native.at_most(level):
        if native.level() != level:
            pytest.skip(f"this CPU has no {level}")


def guarded(*shape: int) -> tuple[Tensor, Tensor]:
    """A result to be written, not a number anywhere, and the elements behind it."""
    flat = torch.full((math.prod(shape) + GUARD,), torch.nan, dtype=torch.bfloat16)
    return flat[:-GUARD].view(*shape), flat[-GUARD:]


def linear(x_MI: Tensor, w_OI: Tensor, bias_O: Tensor | None, threads: int = 1) -> Tensor | None:
    (M, I), O = x_MI.shape, w_OI.shape[0]  # noqa: E741
    y_MO, behind = guarded(M, O)
    bias = native.pointer(bias_O)
    done = native.library().ft_linear_dense(
        native.pointer(w_OI), *sizes(M, O, I), native.pointer(x_MI), bias, native.pointer(y_MO), threads
    )
    assert behind.isnan().all()
    return y_MO if done else None


def input_gradient(g_MO: Tensor, w_OI: Tensor, threads: int = 1) -> Tensor | None:
    (M, O), I = g_MO.shape, w_OI.shape[1]  # noqa: E741
    gx_MI, behind = guarded(M, I)
    done = native.library().ft_input_gradient_dense(
        native.pointer(w_OI), *sizes(M, O, I), native.pointer(g_MO), native.pointer(gx_MI), threads
    )
    assert behind.isnan().all()
    return gx_MI if done else None


def int8_linear(
    x_MI: Tensor, w_OI: Tensor, y_MO: Tensor, scales: tuple[Tensor, Tensor, float] | None, bias_O: Tensor | None
) -> bool:
    scale_M, scale_O, unit = scales or (None, None, 1.0)
    return bool(
        native.library().ft_int8_linear(
            *map(native.pointer, (x_MI, w_OI, scale_M, scale_O)), ctypes.c_float(unit),
            native.pointer(bias_O), native.pointer(y_MO), native.DTYPES.get(y_MO.dtype, 0),
            *sizes(x_MI.shape[0], w_OI.shape[0], x_MI.shape[1]), 2,
        )
    )  # fmt: skip


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def assert_rounded_once(found: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """`found` is a @ b (+ bias) within half a bf16 step and what float32 sums may lose."""
    exact = a.double() @ b.double()
    magnitude = a.double().abs() @ b.double().abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    slack = 2.0**-8 * exact.abs() + 2.0**-20 * magnitude
    assert ((found.double() - exact).abs() <= slack).all()


def check(M: int, O: int, I: int, with_bias: bool, threads: int = 1) -> None:  # noqa: E741
    torch.manual_seed(M * 7919 + O * 31 + I)
    w_OI, x_MI, g_MO = random(O, I), random(M, I), random(M, O)
    bias_O = random(O) if with_bias else None
    y_MO, gx_MI = linear(x_MI, w_OI, bias_O, threads), input_gradient(g_MO, w_OI, threads)
    assert y_MO is not None and gx_MI is not None
    assert_rounded_once(y_MO, x_MI, w_OI.T, bias_O)
    assert_rounded_once(gx_MI, g_MO, w_OI)


@pytest.mark.parametrize("level", ENGINES)
@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(1, 64),
    O=st.integers(1, 130),
    I=st.integers(1, 200),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_shape(level: str, M: int, O: int, I: int, with_bias: bool, threads: int) -> None:  # noqa: E741
    served(level)
    with native.at_most(level):
        check(M, O, I, with_bias, threads)


@pytest.mark.parametrize("level", ENGINES)
@pytest.mark.parametrize("M", [1, 3, 8, 64])
@pytest.mark.parametrize("shape", [(70, 4500), (4500, 70)])
def test_long_sums_are_cut_and_put_together(level: str, M: int, shape: tuple[int, int]) -> None:
    served(level)
    with native.at_most(level):
        check(M, *shape, with_bias=True)


@pytest.mark.parametrize("shape", [(333, 517, 1031), (1025, 64, 96)])
def test_many_rows_by_tiles(shape: tuple[int, int, int]) -> None:
    served("amx")
    check(*shape, with_bias=True, threads=2)


@pytest.mark.parametrize("level", ENGINES)
def test_what_follows_the_last_column_is_no_part_of_a_row(level: str) -> None:
    """Inputs end where they end: a NaN behind them, or left in a scratch by an earlier call, must not show."""
    served(level)
    with native.at_most(level):
        linear(torch.full((40, 96), torch.nan).bfloat16(), torch.full((50, 96), torch.nan).bfloat16(), None)
        input_gradient(torch.full((40, 96), torch.nan).bfloat16(), torch.full((96, 50), torch.nan).bfloat16())
        check(33, 37, 41, with_bias=False)
        check(5, 37, 41, with_bias=False)
        input_gradient(torch.full((40, 96), torch.nan).bfloat16(), torch.full((96, 50), torch.nan).bfloat16())
        check(33, 5, 41, with_bias=False)


@pytest.mark.parametrize("level", ENGINES)
def test_threads_and_rows_beside_do_not_change_a_row(level: str) -> None:
    """One numerics: the same row gives the same bits whatever the thread count and whatever else is in the batch."""
    served(level)
    w_OI, x_MI, g_MO = random(300, 260), random(64, 260), random(64, 300)
    with native.at_most(level):
        y_MO, gx_MI = linear(x_MI, w_OI, None), input_gradient(g_MO, w_OI)
        assert y_MO is not None and gx_MI is not None
        assert y_MO.equal(linear(x_MI, w_OI, None, threads=2))  # type: ignore[arg-type]
        assert gx_MI.equal(input_gradient(g_MO, w_OI, threads=2))  # type: ignore[arg-type]
        assert y_MO[16:48].equal(linear(x_MI[16:48].contiguous(), w_OI, None))  # type: ignore[arg-type]
        assert gx_MI[16:48].equal(input_gradient(g_MO[16:48].contiguous(), w_OI))  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_below_its_instructions_an_engine_declines(level: str) -> None:
    with native.at_most(level):
        assert linear(random(4, 32), random(8, 32), None) is None
        assert input_gradient(random(4, 8), random(8, 32)) is None


def test_without_tiles_many_rows_are_left_to_the_vendor() -> None:
    served("avx512_bf16")
    with native.at_most("avx512_bf16"):
        check(128, 33, 65, with_bias=False)
        assert linear(random(129, 32), random(8, 32), None) is None


def test_nothing_to_do_is_declined() -> None:
    assert linear(torch.empty(0, 32, dtype=torch.bfloat16), random(8, 32), None) is None


@settings(max_examples=30, deadline=None)
@given(M=st.integers(1, 100), O=st.integers(1, 130), I=st.integers(1, 300), dtype=st.sampled_from(["f32", "bf16"]))
def test_products_of_codes_are_exact_and_scaled_in_float32(M: int, O: int, I: int, dtype: str) -> None:  # noqa: E741
    served("amx")
    torch.manual_seed(M * 7919 + O * 31 + I)
    x_MI, w_OI = (torch.randint(-128, 128, (rows, I), dtype=torch.int8) for rows in (M, O))
    exact = (x_MI.double() @ w_OI.double().T).to(torch.int32)
    plain = torch.full((M * O + GUARD,), 7, dtype=torch.int32)
    assert int8_linear(x_MI, w_OI, plain, None, None)
    assert plain[:-GUARD].view(M, O).equal(exact) and (plain[-GUARD:] == 7).all()
    wanted = torch.float32 if dtype == "f32" else torch.bfloat16
    scale_M, scale_O, unit, bias_O = torch.rand(M), torch.rand(O), 1 / 127**2, torch.randn(O).to(wanted)
    scaled = torch.full((M * O + GUARD,), 7, dtype=wanted)
    assert int8_linear(x_MI, w_OI, scaled, (scale_M, scale_O, unit), bias_O)
    expected = exact.float() * (torch.outer(scale_M, scale_O) * unit) + bias_O.float()
    assert scaled[:-GUARD].view(M, O).equal(expected.to(wanted)) and (scaled[-GUARD:] == 7).all()


def test_products_of_codes_want_tiles() -> None:
    codes = torch.ones(8, 64, dtype=torch.int8)
    with native.at_most("avx512_bf16"):
        assert not int8_linear(codes, codes, torch.empty(8, 8, dtype=torch.int32), None, None)

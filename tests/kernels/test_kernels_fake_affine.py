"""Fake quantization: torch's own as the oracle of values and masks, finite differences that of LSQ's gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from finetune.kernels import affine
from finetune.kernels.computed_linear import computed_linear
from finetune.kernels.fake_affine import fake_quantize, gradient_factor
from finetune.quant.affine_grid import AffineGrid

CASES = [(2, 32, 96), (3, 32, 80), (4, 64, 100), (8, -1, 48), (3, 64, 40)]
"""Bits, size of groups, width; the last group of a row is short in three of them, and the only one in the last."""


def weight(width: int, rows: int = 12) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def grid_of(w_OI: Tensor, bits: int, size: int, zero: str, shrink: float = 0.55) -> AffineGrid:
    """A grid that clips some weights; its scales are no powers of two."""
    symmetric = zero == "none"
    shares = torch.tensor(shrink)
    return AffineGrid.fit(w_OI, bits, size, symmetric=symmetric, zero_point=zero, shrink_OG=shares, narrow=False)


@pytest.mark.parametrize("zero", ["none", "integer", "real"])
@pytest.mark.parametrize(("bits", "size", "width"), CASES)
def test_it_gives_what_the_codes_decode_to_bit_for_bit(bits: int, size: int, width: int, zero: str) -> None:
    w_OI = weight(width)
    grid = grid_of(w_OI, bits, size, zero)
    arguments = (w_OI, grid.scale_OG, grid.zero_OG, bits, size)
    wanted = affine.decode(grid.encode(w_OI), grid.scale_OG, grid.zero_OG, bits, size)
    assert torch.equal(fake_quantize(*arguments), wanted)
    with torch.no_grad():
        assert torch.equal(fake_quantize(*arguments), wanted)
    again = fake_quantize(wanted, *arguments[1:])
    assert torch.equal(again, wanted) if zero != "real" else torch.allclose(again, wanted, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size", "width"), CASES)
def test_values_and_gradients_are_torchs_own(bits: int, size: int, width: int, symmetric: bool) -> None:
    """A group at a time, as torch knows one axis: the rows of a group are its channels."""
    w_OI = weight(width).requires_grad_()
    grid = grid_of(w_OI.detach(), bits, size, "none" if symmetric else "integer")
    mine = fake_quantize(w_OI, grid.scale_OG, grid.zero_OG, bits, size)
    step = width if size < 0 else size
    upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(mine, w_OI, upstream)
    clipped = 0
    for group, columns in enumerate(torch.arange(width).split(step)):
        part = w_OI.detach()[:, columns].contiguous().requires_grad_()
        zero = torch.full((12,), 2 ** (bits - 1)) if grid.zero_OG is None else grid.zero_OG[:, group]
        theirs = torch.fake_quantize_per_channel_affine(
            part, grid.scale_OG[:, group].contiguous(), zero.int(), 0, 0, 2**bits - 1
        )
        assert torch.equal(mine[:, columns], theirs)
        theirs.backward(upstream[:, columns])
        assert torch.equal(gradient[:, columns], part.grad)
        clipped += int((part.grad == 0).sum())
    assert 0 < clipped < mine.numel() / 2


@pytest.mark.parametrize("zero", ["none", "integer", "real"])
@pytest.mark.parametrize(("bits", "size", "width"), CASES)
def test_the_gradient_of_a_step_is_that_of_its_smooth_part(bits: int, size: int, width: int, zero: str) -> None:
    """In float64: with rounding errors held, `s (w / s + error)` where no code was clipped, `s q` where it was."""
    w_OI = weight(width).double()
    grid = grid_of(w_OI.float(), bits, size, zero)
    scale, offset = grid.scale_OG.double(), None if grid.zero_OG is None else grid.zero_OG
    real = offset is not None and offset.is_floating_point()
    offset = offset.double() if real else offset
    codes = grid.encode(w_OI.float())
    spread = [affine.spread(t.double(), width, size) for t in (scale, *([] if offset is None else [offset]))]
    middle = 2 ** (bits - 1) if offset is None else 0 if real else spread[1]
    upstream = torch.randn(w_OI.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nearest = ((w_OI - (spread[1] if real else 0)) / spread[0]).round()
    inside = nearest == codes.double() - middle

    def smooth(s_OG: Tensor, z_OG: Tensor | None) -> Tensor:
        s, z = affine.spread(s_OG, width, size), affine.spread(z_OG, width, size) if real else 0
        steps = (w_OI - z) / s
        error = (nearest - (w_OI - (spread[1] if real else 0)) / spread[0]).detach()
        return (torch.where(inside, steps + error, codes.double() - middle) * s + z).mul(upstream).sum()

    trained = [scale.requires_grad_(), *([offset.requires_grad_()] if real else [])]
    value = fake_quantize(w_OI, scale, offset, bits, size)
    found = torch.autograd.grad(value, trained, upstream)
    factor = gradient_factor(size, width, bits)
    assert factor == 1 / math.sqrt((width if size < 0 else size) * (2 ** (bits - 1) - 1))
    for place, gradient in enumerate(found):
        for at in ((0, 0), (5, scale.shape[1] - 1)):
            nudge = torch.zeros_like(scale)
            nudge[at] = 1e-6
            ends = []
            for sign in (1, -1):
                moved = [t.detach() + sign * nudge * (number == place) for number, t in enumerate(trained)]
                ends.append(smooth(moved[0], moved[1] if real else None))
            wanted = float(ends[0] - ends[1]) / 2e-6 * factor
            assert float(gradient[at]) == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_a_computed_weight_gives_autograds_gradients_and_keeps_nothing() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((2, 7, 16), (4, 16), (24, 4)))
    bias, calls = torch.randn(24), []

    def product(a_RI: Tensor, b_OR: Tensor) -> Tensor:
        calls.append(1)
        return (b_OR @ a_RI).tanh()

    mine, plain = computed_linear(x, bias, product, a, b), torch.nn.functional.linear(x, product(a, b), bias)
    assert torch.equal(mine, plain) and torch.equal(mine, computed_linear(x.detach(), bias, product, a, b))
    upstream = torch.randn_like(mine)
    wanted = torch.autograd.grad(plain, (x, a, b), upstream)
    calls.clear()
    found = torch.autograd.grad(mine, (x, a, b), upstream)
    assert len(calls) == 1
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    again = computed_linear(x, bias, product, a, b)
    assert sum(t.numel() for t in again.grad_fn.saved_tensors) == x.numel() + a.numel() + b.numel()


def test_under_autocast_it_computes_in_the_lower_dtype() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = computed_linear(x, None, lambda w: w * 1.0, w)
    assert y.dtype == torch.bfloat16
    wanted = torch.nn.functional.linear(x.bfloat16(), w.bfloat16())
    assert torch.equal(y, wanted)
    y.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32

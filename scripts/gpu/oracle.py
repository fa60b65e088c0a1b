"""What the checks compare with, and how near it has to be."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels.triton_backend import INTERPRETED

ROUNDING = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
"""Relative error (L2) that a product may have by the rounding of its output and the order of its sums."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values of rows that differ in size, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], generator=generator).view(-1, *[1] * (len(shape) - 1)) + 0.1
    return (torch.randn(shape, generator=generator) * rows).to(dtype)


def same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """Both hold the same values, NaN apart; bfloat16 may differ by a unit in the interpreter, which truncates."""
    found = found.cpu()
    if INTERPRETED and found.dtype == torch.bfloat16:
        near = (found.float() - expected.float()).abs() <= expected.float().abs() * 2**-7
        assert bool(near.all()), f"{what}: further than a unit from the reference"
        return
    assert torch.equal(found, expected), f"{what}: {int((found != expected).sum())} of {found.numel()} values differ"


def close(found: Tensor, exact: Tensor, what: str) -> float:
    """The relative error of a product against float64; more than its dtype's rounding raises."""
    error = float((found.cpu().double() - exact).norm() / exact.norm())
    assert error < ROUNDING[found.dtype], f"{what}: relative error {error:.2e} (limit {ROUNDING[found.dtype]:.0e})"
    return error

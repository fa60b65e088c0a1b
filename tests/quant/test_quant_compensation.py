"""Compensated rounding: better than nearest where inputs are correlated, the same where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.quant.base import QUANTIZERS
from finetune.quant.codebook4 import Codebook4Linear
from finetune.quant.compensation import compensate
from finetune.quant.fp4 import FP4Config
from finetune.quant.nf4 import NF4Config


def stored(config: NF4Config | FP4Config, w_OI: torch.Tensor) -> Codebook4Linear:
    linear = QUANTIZERS.build(config, *w_OI.shape, dtype=torch.float32)
    linear.store(w_OI)
    return linear


def correlated(columns: int, rows: int = 512) -> torch.Tensor:
    """Inputs whose spectrum falls off as a power, mixed, with a few heavy channels: what hidden states look like."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, columns + 1, dtype=torch.float32) ** -0.7
    mix, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    x_NI = (torch.randn(rows, columns, generator=generator) * spectrum) @ mix
    x_NI[:, :6] *= 5
    return x_NI


@pytest.mark.parametrize("config", [NF4Config(), NF4Config(double_quant=False), FP4Config()], ids=lambda c: c.name)
def test_correlated_inputs_lose_less_than_half_the_error(config: NF4Config | FP4Config) -> None:
    w_OI = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    seen, unseen = correlated(128, 1024).chunk(2)
    linear = stored(config, w_OI)
    nearest = linear.dequantize(torch.float32)
    result = compensate(linear, w_OI, seen.T @ seen)
    assert result.damping == 0.01 and result.error < result.error_rtn / 2

    def lost(decoded: torch.Tensor) -> float:
        return float((unseen @ (w_OI - decoded).T).square().sum())

    assert lost(linear.dequantize(torch.float32)) < 0.6 * lost(nearest)


def test_uncorrelated_inputs_change_no_code() -> None:
    """H = I: nothing can be made good elsewhere, so rounding to nearest is the answer, bit for bit."""
    w_OI = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    linear = stored(NF4Config(double_quant=False), w_OI)
    codes = linear.weight.clone()
    compensate(linear, w_OI, torch.eye(128))
    assert torch.equal(linear.weight, codes)


@pytest.mark.parametrize("shape", [(3, 5), (7, 96), (96, 80), (1, 33)], ids=str)
def test_blocks_that_straddle_rows_and_odd_counts(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    w_OI = torch.randn(*shape, generator=generator)
    x_NI = torch.randn(64, shape[1], generator=generator) @ torch.randn(shape[1], shape[1], generator=generator)
    linear = stored(NF4Config(block_size=32), w_OI)
    scales = [p.clone() for p in linear.packed()[1:] if p is not None]
    result = compensate(linear, w_OI, x_NI.T @ x_NI)
    assert result.error <= result.error_rtn
    assert all(
        torch.equal(a, b) for a, b in zip(scales, [p for p in linear.packed()[1:] if p is not None], strict=True)
    )
    error = (x_NI @ (w_OI - linear.dequantize(torch.float32)).T).square().sum() / (x_NI @ w_OI.T).square().sum()
    assert float(error) == pytest.approx(result.error, rel=1e-3, abs=1e-7)


def test_dead_inputs_and_a_singular_product_are_rounded_all_the_same() -> None:
    w_OI = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    linear = stored(NF4Config(), w_OI)
    gram_II = torch.zeros(64, 64)
    gram_II[:2, :2] = torch.tensor([[4.0, 4.0], [4.0, 4.0]])
    result = compensate(linear, w_OI, gram_II)
    assert result.error <= result.error_rtn
    assert linear.dequantize(torch.float32).isfinite().all()


def test_no_inputs_at_all_leave_the_nearest_codes() -> None:
    w_OI = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    linear = stored(NF4Config(), w_OI)
    codes = linear.weight.clone()
    assert compensate(linear, w_OI, torch.zeros(64, 64)).damping is None
    assert torch.equal(linear.weight, codes) and isinstance(linear.weight, nn.Parameter)

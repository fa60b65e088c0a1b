"""GPTQ over every grid: better than nearest where inputs are correlated, the same where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quant_matrices import correlated, empty, name, normal
from torch import Tensor

from finetune.errors import ConfigError
from finetune.quant.affine import Int2Config, Int3Config, Int4Config, Int8gConfig
from finetune.quant.base import QuantConfig
from finetune.quant.fp4 import FP4Config
from finetune.quant.int8_storage import Int8Config
from finetune.quant.nf4 import NF4Config
from finetune.quant.packed import PackedWeight
from finetune.quant.rounders.base import CALIBRATORS, apply
from finetune.quant.rounders.gptq import GPTQ, GPTQConfig, inverse_factor
from finetune.quant.rounders.rtn import RTN

PLAIN: list[QuantConfig] = [
    NF4Config(double_quant=False),
    FP4Config(double_quant=False, block_size=32),
    Int8Config(),
    Int8gConfig(group_size=32),
    Int4Config(group_size=-1),
    Int4Config(group_size=32, symmetric=True),
    Int3Config(group_size=64, zero_point="real"),
    Int2Config(group_size=32),
]
FORMATS = [*PLAIN, NF4Config()]


def state(module: PackedWeight) -> list[Tensor]:
    return [getattr(module, part) for part in module.stored if getattr(module, part) is not None]


@pytest.mark.parametrize("shape", [(24, 40), (7, 33), (3, 5), (2, 24, 40), (3, 5, 33)], ids=str)
@pytest.mark.parametrize("config", PLAIN, ids=name)
def test_storing_is_fitting_rounding_and_taking(config: QuantConfig, shape: tuple[int, ...]) -> None:
    module, other, w = empty(config, *shape), empty(config, *shape), normal(*shape)
    module.store(w)
    grid = other.fit(w)
    other.take(grid, grid.round_columns(w, 0))
    assert all(torch.equal(a, b) for a, b in zip(state(module), state(other), strict=True))
    codes = grid.round_columns(w, 0)
    assert torch.equal(grid.decode(codes), module.decode(torch.float32))
    decoded = module.decode(torch.float32)
    if len(shape) == 3:
        grid, w, codes, decoded = grid.expert(1), w[1], codes[1], decoded[1]
    for cut in (slice(0, 2), slice(1, 2), slice(2, 5)):
        assert torch.equal(grid.round_columns(w[:, cut], cut.start), codes[:, cut])
        assert torch.equal(grid.decode(codes[:, cut], cut.start), decoded[:, cut])


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
@pytest.mark.parametrize("config", FORMATS, ids=name)
def test_uncorrelated_inputs_change_no_code(config: QuantConfig, act_order: bool) -> None:
    """H = I: nothing can be made good elsewhere, so the nearest codes are the answer, bit for bit."""
    w_OI = normal(64, 200)
    grid = empty(config, 64, 200).fit(w_OI)
    choice = GPTQ(GPTQConfig(act_order=act_order)).choose(grid, w_OI, torch.eye(200))
    assert choice is not None and torch.equal(choice.codes_OI, grid.round_columns(w_OI, 0))


@pytest.mark.parametrize("config", FORMATS, ids=name)
def test_correlated_inputs_lose_less_than_half_the_error(config: QuantConfig) -> None:
    w_OI = normal(96, 128)
    seen, unseen = correlated(128, 2048).chunk(2)
    module, nearest = empty(config, 96, 128), empty(config, 96, 128)
    nearest.store(w_OI)
    result = apply(GPTQ(), module, w_OI, [seen.T @ seen])
    assert result.damping == 0.01 and not result.note
    assert result.error_rtn >= 2.0 * result.error

    def lost(decoded: Tensor) -> float:
        return float((unseen @ (w_OI - decoded).T).square().sum())

    assert lost(module.decode(torch.float32)) < 0.65 * lost(nearest.decode(torch.float32))
    exact = (seen @ (w_OI - module.decode(torch.float32)).T).square().sum() / (seen @ w_OI.T).square().sum()
    assert float(exact) == pytest.approx(result.error, rel=1e-3)


def test_codes_are_those_of_the_definition() -> None:
    """Column after column in float64, one rank-one update at a time, on the given grid."""
    w_OI, x_NI = normal(16, 160), correlated(160)
    gram_II = x_NI.T @ x_NI
    grid = empty(Int4Config(group_size=32), 16, 160).fit(w_OI)
    choice = GPTQ(GPTQConfig(act_order=False)).choose(grid, w_OI, gram_II)
    assert choice is not None
    hessian = gram_II.double()
    hessian += torch.eye(160, dtype=torch.float64) * 0.01 * hessian.diagonal().mean()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left = w_OI.double()
    expected = torch.empty_like(choice.codes_OI)
    for column in range(160):
        code = grid.round_columns(left[:, column : column + 1].float(), column)
        expected[:, column : column + 1] = code
        error = (left[:, column : column + 1] - grid.decode(code, column)) / factor[column, column]
        left[:, column:] -= error @ factor[column : column + 1, column:]
    assert (choice.codes_OI == expected).float().mean() >= 0.999


def test_order_of_inputs_does_not_matter_with_act_order() -> None:
    w_OI, x_NI, config = normal(32, 96), correlated(96), Int4Config(group_size=-1)
    shuffled = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    codes = []
    for order in (torch.arange(96), shuffled):
        choice = GPTQ().choose(
            empty(config, 32, 96).fit(w_OI[:, order]), w_OI[:, order], x_NI[:, order].T @ x_NI[:, order]
        )
        assert choice is not None
        codes.append(choice.codes_OI)
    assert (codes[0][:, shuffled] == codes[1]).float().mean() > 0.999


@pytest.mark.parametrize("shape", [(3, 5), (7, 96), (96, 80), (1, 33)], ids=str)
@pytest.mark.parametrize("config", [NF4Config(block_size=32), Int3Config(group_size=32)], ids=name)
def test_odd_shapes_keep_the_scales_and_never_get_worse(config: QuantConfig, shape: tuple[int, int]) -> None:
    w_OI, x_NI = normal(*shape, seed=3), normal(64, shape[1]) @ normal(shape[1], shape[1], seed=4)
    nearest, module = empty(config, *shape), empty(config, *shape)
    nearest.store(w_OI)
    result = apply(GPTQ(), module, w_OI, [x_NI.T @ x_NI])
    assert result.error <= result.error_rtn
    assert all(torch.equal(a, b) for a, b in zip(state(module)[1:], state(nearest)[1:], strict=True))


def test_experts_are_rounded_each_on_its_own_inputs() -> None:
    w_EOI, x_NI = normal(3, 24, 48), correlated(48)
    gram_II = x_NI.T @ x_NI
    module, nearest = empty(Int4Config(group_size=32), 3, 24, 48), empty(Int4Config(group_size=32), 3, 24, 48)
    nearest.store(w_EOI)
    result = apply(GPTQ(), module, w_EOI, [gram_II, None, torch.eye(48)])
    assert "saw no inputs" in result.note and result.error < result.error_rtn
    ours, theirs = module.decode(torch.float32), nearest.decode(torch.float32)
    assert not torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
    alone = empty(Int4Config(group_size=32), 24, 48)
    apply(GPTQ(), alone, w_EOI[0], [gram_II])
    assert torch.equal(alone.decode(torch.float32), ours[0])


def test_dead_inputs_and_a_singular_product_are_rounded_all_the_same() -> None:
    w_OI, gram_II = normal(32, 64), torch.zeros(64, 64)
    gram_II[:2, :2] = torch.tensor([[4.0, 4.0], [4.0, 4.0]])
    module = empty(Int4Config(group_size=32), 32, 64)
    result = apply(GPTQ(), module, w_OI, [gram_II])
    assert result.error <= result.error_rtn
    grid = module.fit(w_OI)
    decoded = grid.decode(grid.round_columns(w_OI, 0))
    assert torch.equal(module.decode(torch.float32)[:, 2:], decoded[:, 2:])


def test_damping_grows_until_a_factor_exists_and_says_so() -> None:
    """An H that is indefinite by rounding: its negative eigenvalue outweighs the first damping."""
    basis, _ = torch.linalg.qr(normal(16, 16))
    gram_II = basis @ torch.diag(torch.tensor([1.0] * 15 + [-0.05])) @ basis.T
    gram_II = (gram_II + gram_II.T) / 2
    factor, damping = inverse_factor(gram_II, 0.01)
    assert factor is not None and damping == pytest.approx(0.1)
    hopeless, damping = inverse_factor(torch.diag(torch.tensor([1.0] * 15 + [-20.0])), 0.01)
    assert hopeless is None and damping == pytest.approx(1.0)
    choice = GPTQ().choose(empty(Int4Config(), 4, 16).fit(normal(4, 16)), normal(4, 16), gram_II)
    assert choice is not None and "damping 0.1" in choice.note


def test_no_inputs_leave_the_nearest_codes_and_are_reported() -> None:
    w_OI = normal(32, 64)
    for grams, words in (([None], "saw no inputs"), ([torch.zeros(64, 64)], "all zero")):
        module, nearest = empty(NF4Config(), 32, 64), empty(NF4Config(), 32, 64)
        nearest.store(w_OI)
        result = apply(GPTQ(), module, w_OI, grams)
        assert words in result.note and result.damping is None
        assert all(torch.equal(a, b) for a, b in zip(state(module), state(nearest), strict=True))


def test_searched_scales_err_less_at_two_bits() -> None:
    w_OI = normal(32, 128)
    module = empty(Int2Config(group_size=64), 32, 128)
    full, searched = module.fit(w_OI), module.fit_clipped(w_OI)

    def error(grid: Any) -> float:
        return float((grid.decode(grid.round_columns(w_OI, 0)) - w_OI).abs().pow(2.4).sum())

    assert error(searched) < 0.9 * error(full)
    x_NI = correlated(128)
    apply(GPTQ(GPTQConfig(mse=True)), module, w_OI, [x_NI.T @ x_NI])
    assert torch.equal(module.packed()[1], searched.scale_OG)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="damping is 0"):
        GPTQConfig(damping=0)
    with pytest.raises(ConfigError, match="quant=nf4"):
        GPTQConfig(mse=True).check_format(NF4Config())
    assert {"rtn", "gptq"} <= set(CALIBRATORS.types())


@pytest.mark.parametrize("config", FORMATS, ids=name)
def test_rtn_is_what_storing_does(config: QuantConfig) -> None:
    module, nearest, w_OI = empty(config, 24, 40), empty(config, 24, 40), normal(24, 40)
    nearest.store(w_OI)
    result = apply(RTN(), module, w_OI, [torch.eye(40)])
    assert result.error == result.error_rtn > 0
    assert all(torch.equal(a, b) for a, b in zip(state(module), state(nearest), strict=True))

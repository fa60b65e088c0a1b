"""GPTQ with groups that are fitted when they are reached, over every grid that has groups."""

from __future__ import annotations

import pytest
import torch
from quant_matrices import empty, gram, name, normal
from torch import Tensor

from finetune.quant.affine import Int2Config, Int3Config, Int4Config, Int8gConfig
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.fp4 import FP4Config
from finetune.quant.ggml_storage import GgmlConfig
from finetune.quant.grid import Grid, Regrouped
from finetune.quant.int8_storage import Int8Config
from finetune.quant.nf4 import NF4Config
from finetune.quant.packed import PackedWeight
from finetune.quant.rounders.base import apply
from finetune.quant.rounders.gptq import GPTQ, GPTQConfig, by_energy
from finetune.quant.rounders.zeros import ZerosKept
from finetune.quant.w8a8 import W8A8Config


def llama_cpp(name: str, outliers: int = 0) -> GgmlConfig:
    kind: type[GgmlConfig] = QUANTIZERS.type_of(name)  # type: ignore[assignment]
    return kind(outliers=outliers)


GROUPED: list[QuantConfig] = [
    NF4Config(block_size=32, double_quant=False),
    NF4Config(block_size=32),
    FP4Config(block_size=32),
    Int8gConfig(group_size=32),
    Int4Config(group_size=64),
    Int4Config(group_size=32, symmetric=True),
    Int3Config(group_size=32, zero_point="real"),
    Int2Config(group_size=32),
    llama_cpp("q4_0"),
    llama_cpp("q4_1"),
    llama_cpp("q5_0", 2),
    llama_cpp("q8_0"),
]
ROWS: list[QuantConfig] = [Int8Config(), W8A8Config(), Int4Config(group_size=-1), Int4Config(group_size=256)]
ON_THE_WAY = {order: GPTQ(GPTQConfig(act_order=order, static_groups=False)) for order in (False, True)}


def state(module: PackedWeight) -> list[Tensor]:
    return [getattr(module, part) for part in module.stored if getattr(module, part) is not None]


def lost(w_OI: Tensor, decoded_OI: Tensor, gram_II: Tensor) -> float:
    delta_OI = (w_OI - decoded_OI).double()
    return float(((delta_OI @ gram_II.double()) * delta_OI).sum())


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_and_ranges_are_those_of_the_definition(symmetric: bool) -> None:
    """Column after column in float64: min and max of a group as its weights are when it is reached."""
    width, size, steps = 160, 32, 15
    w_OI, gram_II = normal(16, width), gram(width, 1.0)
    module = empty(Int4Config(group_size=size, symmetric=symmetric), 16, width)
    grid = module.fit(w_OI)
    choice = ON_THE_WAY[False].choose(grid, w_OI, gram_II)
    assert choice is not None and choice.grid is not None
    hessian = gram_II.double() + torch.eye(width, dtype=torch.float64) * 0.01 * gram_II.double().diagonal().mean()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, expected = w_OI.double(), torch.empty_like(choice.codes_OI)
    for column in range(width):
        if column % size == 0:
            group = left[:, column : column + size]
            least, most = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            span = 2 * torch.maximum(most, -least) if symmetric else most - least
            scale = (span / steps).half().double()
            zero = torch.full_like(scale, 8) if symmetric else (-least / scale).round()
        code = (left[:, column] / scale + zero).round().clamp(0, steps)
        expected[:, column] = code.to(torch.uint8)
        error = (left[:, column] - scale * (code - zero)) / factor[column, column]
        left[:, column:] -= error.unsqueeze(1) * factor[column, column:]
    assert (choice.codes_OI == expected).float().mean() >= 0.995
    decoded = choice.grid.decode(choice.codes_OI)
    assert lost(w_OI, decoded, gram_II) < 0.7 * lost(w_OI, grid.decode(grid.round_columns(w_OI, 0)), gram_II)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
@pytest.mark.parametrize("config", GROUPED, ids=name)
def test_what_is_stored_is_what_was_chosen(config: QuantConfig, act_order: bool) -> None:
    """On a grid that is another than the one that spans the weight; less is lost than by rounding to nearest."""
    w_OI, gram_II = normal(24, 192), gram(192, 1.0)
    module, nearest = empty(config, 24, 192), empty(config, 24, 192)
    nearest.store(w_OI)
    result = apply(ON_THE_WAY[act_order], module, w_OI, [gram_II])
    energy = lost(w_OI, torch.zeros_like(w_OI), gram_II)
    choice = ON_THE_WAY[act_order].choose(nearest.fit(w_OI), w_OI, gram_II)
    assert choice is not None and choice.grid is not None
    same_OI = torch.ones_like(choice.codes_OI)
    assert not torch.equal(choice.grid.decode(same_OI), nearest.fit(w_OI).decode(same_OI))
    exact = lost(w_OI, module.decode(torch.float32), gram_II) / energy
    assert exact == pytest.approx(result.error, rel=1e-3)
    assert result.error < 0.85 * lost(w_OI, nearest.decode(torch.float32), gram_II) / energy


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
@pytest.mark.parametrize("config", GROUPED, ids=name)
def test_uncorrelated_inputs_change_neither_codes_nor_ranges(config: QuantConfig, act_order: bool) -> None:
    w_OI = normal(20, 96)
    grid = empty(config, 20, 96).fit(w_OI)
    choice = ON_THE_WAY[act_order].choose(grid, w_OI, torch.eye(96))
    assert choice is not None and choice.grid is not None
    codes_OI = grid.round_columns(w_OI, 0)
    assert torch.equal(choice.codes_OI, codes_OI)
    assert torch.equal(choice.grid.decode(codes_OI), grid.decode(codes_OI))


@pytest.mark.parametrize(
    ("config", "width"), [*((config, 192) for config in ROWS), (NF4Config(), 100), (Int4Config(group_size=256), 200)]
)
def test_where_a_row_is_one_group_there_is_no_difference(config: QuantConfig, width: int) -> None:
    """Nor where blocks run over more than one row."""
    w_OI, gram_II = normal(24, width), gram(width, 1.0)
    modules = [empty(config, 24, width) for _ in range(2)]
    for module, static in zip(modules, (True, False), strict=True):
        apply(GPTQ(GPTQConfig(static_groups=static)), module, w_OI, [gram_II])
    assert all(torch.equal(a, b) for a, b in zip(*map(state, modules), strict=True))


@pytest.mark.parametrize("config", [Int4Config(group_size=32), Int4Config(group_size=64)], ids=name)
def test_a_short_group_comes_last(config: Int4Config) -> None:
    w_OI, gram_II = normal(24, 200), gram(200, 1.0)
    module = empty(config, 24, 200)
    result = apply(ON_THE_WAY[True], module, w_OI, [gram_II])
    exact = lost(w_OI, module.decode(torch.float32), gram_II) / lost(w_OI, torch.zeros_like(w_OI), gram_II)
    assert exact == pytest.approx(result.error, rel=1e-3) and result.error < 0.8 * result.error_rtn


def test_an_order_by_energy_keeps_groups_together() -> None:
    energy = torch.tensor([1.0, 2, 9, 0, 5, 6, 3, 4, 70, 80])
    assert by_energy(energy, 4).tolist() == [5, 4, 7, 6, 2, 1, 0, 3, 9, 8]
    assert by_energy(energy, None).tolist() == [9, 8, 2, 5, 4, 7, 6, 1, 0, 3]


@pytest.mark.parametrize("config", GROUPED, ids=name)
def test_experts_are_fitted_each_on_its_own_inputs(config: QuantConfig) -> None:
    w_EOI, gram_II = normal(3, 16, 96), gram(96, 1.0)
    module, alone = empty(config, 3, 16, 96), empty(config, 16, 96)
    result = apply(ON_THE_WAY[True], module, w_EOI, [None, gram_II, torch.eye(96)])
    assert "saw no inputs" in result.note
    nearest = module.fit(w_EOI)
    decoded = module.decode(torch.float32)
    for number in (0, 2):
        part = nearest.expert(number)
        torch.testing.assert_close(decoded[number], part.decode(part.round_columns(w_EOI[number], 0)), rtol=0, atol=0)
    if isinstance(config, NF4Config | FP4Config) and config.double_quant:
        return  # the nested ranges are those of the whole stack
    apply(ON_THE_WAY[True], alone, w_EOI[1], [gram_II])
    assert torch.equal(alone.decode(torch.float32), decoded[1])


@pytest.mark.parametrize(
    "config", [NF4Config(block_size=32), Int4Config(group_size=32), Int2Config(group_size=32)], ids=name
)
def test_pruned_weights_stay_zero(config: QuantConfig) -> None:
    w_OI, gram_II = normal(24, 96), gram(96, 1.0)
    w_OI[normal(24, 96, seed=9) > 0] = 0
    module = empty(config, 24, 96)
    result = apply(ZerosKept(ON_THE_WAY[True]), module, w_OI, [gram_II])
    decoded = module.decode(torch.float32)
    assert not decoded[w_OI == 0].any() and decoded[w_OI != 0].any() and result.error < result.error_rtn


def test_ranges_are_searched_on_the_way_as_well() -> None:
    w_OI, gram_II = normal(24, 96), gram(96, 1.0)
    module = empty(Int2Config(group_size=32), 24, 96)
    searching = GPTQ(GPTQConfig(static_groups=False, mse=True))
    grids: list[Grid] = []
    for rounder in (searching, ON_THE_WAY[True]):
        choice = rounder.choose(rounder.fit(module, w_OI), w_OI, gram_II)
        assert choice is not None and isinstance(choice.grid, Regrouped)
        grids.append(choice.grid)
    narrow, wide = (grid.decode(torch.ones(24, 96)) - grid.decode(torch.zeros(24, 96)) for grid in grids)
    assert narrow.mean() < 0.8 * wide.mean()


def test_scales_are_rounded_to_what_the_checkpoint_holds() -> None:
    w_OI, gram_II = normal(24, 96), gram(96, 1.0)
    module = empty(Int4Config(group_size=32), 24, 96)
    module.scale_dtype = torch.bfloat16  # type: ignore[assignment]
    apply(ON_THE_WAY[True], module, w_OI, [gram_II])
    scale = module.packed()[1]  # type: ignore[operator]
    assert torch.equal(scale.float(), scale.bfloat16().float())

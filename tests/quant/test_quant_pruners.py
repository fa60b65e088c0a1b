"""SparseGPT, Wanda and magnitude: the right weights go, as many as asked for, and codes hold zeros exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quant_matrices import correlated, empty, name, normal
from torch import Tensor

from finetune.errors import ConfigError
from finetune.quant.affine import Int2Config, Int3Config, Int4Config, Int8gConfig
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.fp4 import FP4Config
from finetune.quant.grid import Grid
from finetune.quant.int8_storage import Int8Config
from finetune.quant.keep import KeepConfig
from finetune.quant.nf4 import NF4Config
from finetune.quant.packed import PackedWeight
from finetune.quant.pruners.apply import prune
from finetune.quant.pruners.base import PRUNERS, SparseConfig
from finetune.quant.pruners.magnitude import Magnitude, MagnitudeConfig
from finetune.quant.pruners.sparsegpt import SparseGPT, SparseGPTConfig
from finetune.quant.pruners.wanda import Wanda, WandaConfig
from finetune.quant.rounders import base as rounders
from finetune.quant.rounders.base import CALIBRATORS, squared
from finetune.quant.rounders.rtn import RTN
from finetune.quant.rounders.zeros import ZerosKept, holds_zero

METHODS: list[type[SparseConfig]] = [MagnitudeConfig, WandaConfig, SparseGPTConfig]
FORMATS: list[QuantConfig] = [
    NF4Config(),
    NF4Config(double_quant=False, block_size=32),
    FP4Config(),
    Int8Config(),
    Int8gConfig(group_size=32),
    Int4Config(group_size=32),
    Int4Config(group_size=-1, symmetric=True),
    Int3Config(group_size=64),
    Int2Config(group_size=32),
]


def published(
    w_OI: Tensor, gram_II: Tensor, sparsity: float, group: tuple[int, int] | None, grid: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """SparseGPT's algorithm 1 in float64, row by row: no Cholesky factor, the inverse of what is left of H each time;
    no lazy updates; the threshold of the authors' code, which takes the weight at it too."""
    hessian, (rows, width) = gram_II.double(), w_OI.shape
    hessian = hessian + torch.eye(width, dtype=torch.float64) * 0.01 * hessian.diagonal().mean()
    inverses = [torch.linalg.inv(hessian[j:, j:])[0] for j in range(width)]
    w, kept = w_OI.double().clone(), torch.ones(rows, width, dtype=torch.bool)
    for j in range(width):
        if group is None and j % 128 == 0:
            block = range(j, min(j + 128, width))
            scores = torch.stack([w[:, k] ** 2 / inverses[k][0] for k in block], dim=1)
            threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
            kept[:, block.start : block.stop] = scores > threshold
        if group is not None and j % group[1] == 0:
            scores = torch.stack([w[:, k] ** 2 / inverses[k][0] for k in range(j, j + group[1])], dim=1)
            for row in range(rows):
                for k in scores[row].argsort()[: group[0]].tolist():
                    kept[row, j + k] = False
        target = torch.where(kept[:, j], w[:, j], 0)
        if grid is not None:
            target = grid.decode(grid.round_columns(target.float().unsqueeze(1), j), j).squeeze(1).double()
        for row in range(rows):
            w[row, j:] -= (w[row, j] - target[row]) / inverses[j][0] * inverses[j]
        w[:, j] = target
    return w.float(), kept


@pytest.mark.parametrize(
    ("sparsity", "pattern", "grid"),
    [
        (0.5, None, False),
        (0.75, None, False),
        (0.5, "2:4", False),
        (0.5, "4:8", False),
        (0.25, "1:4", False),
        (0.5, None, True),
        (0.5, "2:4", True),
    ],
)
def test_sparsegpt_is_the_published_algorithm(sparsity: float, pattern: str | None, grid: bool) -> None:
    w_OI, x_NI = normal(48, 200), correlated(200)
    gram_II = x_NI.T @ x_NI
    config = SparseGPTConfig(sparsity=sparsity, pattern=pattern)
    fitted = empty(Int4Config(group_size=32), 48, 200).fit(w_OI) if grid else None
    before = w_OI.clone()
    given = w_OI.T.contiguous().T if grid else w_OI
    pruned = SparseGPT(config).prune(given, gram_II, fitted)
    assert torch.equal(given, before)
    wanted_OI, kept_OI = published(w_OI, gram_II, sparsity, config.group, fitted)
    assert (pruned.kept_OI == kept_OI).float().mean() >= 0.999
    ours, theirs = squared(w_OI - pruned.w_OI, gram_II), squared(w_OI - wanted_OI, gram_II)
    assert ours <= 1.01 * theirs
    assert not pruned.w_OI[~pruned.kept_OI].any()
    if fitted is not None:
        assert pruned.codes_OI is not None and torch.equal(fitted.decode(pruned.codes_OI), pruned.w_OI)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4", "1:3", "5:20"])
@pytest.mark.parametrize("kind", METHODS)
def test_exactly_n_of_every_m_go(kind: type[SparseConfig], pattern: str) -> None:
    w_OI, x_NI = normal(7, 240), correlated(240, 64)
    pruned = PRUNERS.build(kind(pattern=pattern)).prune(w_OI, x_NI.T @ x_NI)
    zeros, size = map(int, pattern.split(":"))
    assert ((pruned.w_OI == 0).unflatten(1, (-1, size)).sum(dim=-1) == zeros).all()
    assert torch.equal(pruned.w_OI != 0, pruned.kept_OI)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 33), (5, 129), (24, 300)], ids=str)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("kind", METHODS)
def test_as_many_go_as_were_asked_for(kind: type[SparseConfig], sparsity: float, shape: tuple[int, int]) -> None:
    w_OI, x_NI = normal(*shape), correlated(max(shape[1], 6))[:, : shape[1]]
    pruned = PRUNERS.build(kind(sparsity=sparsity)).prune(w_OI, x_NI.T @ x_NI)
    rows, width = shape
    wanted = rows * int(width * sparsity + 1e-6) if kind is WandaConfig else int(rows * width * sparsity + 1e-6)
    assert int((pruned.w_OI == 0).sum()) == int((~pruned.kept_OI).sum()) == wanted


def test_wanda_compares_weight_times_norm_within_each_output() -> None:
    w_OI, x_NI = normal(9, 40), correlated(40)
    kept_OI = Wanda(WandaConfig(sparsity=0.3)).prune(w_OI, x_NI.T @ x_NI).kept_OI
    for row in range(9):
        scores = w_OI[row].double().abs() * x_NI.double().norm(dim=0)
        assert set(scores.argsort()[:12].tolist()) == set((~kept_OI[row]).nonzero().flatten().tolist())


def test_magnitude_compares_within_the_layer_or_the_row() -> None:
    w_OI = normal(9, 40) * torch.arange(1, 10).unsqueeze(1)
    layer = Magnitude(MagnitudeConfig(sparsity=0.25)).by_magnitude(w_OI)
    assert w_OI[~layer].abs().max() < w_OI[layer].abs().min() and int((~layer).sum()) == 90
    row = Magnitude(MagnitudeConfig(sparsity=0.25, compare="row")).by_magnitude(w_OI)
    assert ((~row).sum(dim=1) == 10).all() and not torch.equal(row, layer)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_on_unseen_inputs_sparsegpt_loses_least_and_magnitude_most(pattern: str | None) -> None:
    w_OI, (seen, unseen) = normal(96, 128), correlated(128, 2048).chunk(2)
    lost = []
    for kind in (SparseGPTConfig, WandaConfig, MagnitudeConfig):
        pruned = PRUNERS.build(kind(pattern=pattern)).prune(w_OI, seen.T @ seen)
        lost.append(squared(w_OI - pruned.w_OI, unseen.T @ unseen))
    assert 2 * lost[0] < lost[1] < lost[2]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("config", FORMATS, ids=name)
def test_every_grid_holds_the_zeros(config: QuantConfig, kind: type[SparseConfig]) -> None:
    w_OI, x_NI = normal(32, 128) + 0.3, correlated(128)
    gram_II, module, simple = x_NI.T @ x_NI, empty(config, 32, 128), empty(config, 32, 128)
    outcome = prune(PRUNERS.build(kind(pattern="2:4")), CALIBRATORS.build(gptq()), module, w_OI, [gram_II])
    decoded = module.decode(torch.float32)
    groups = (decoded == 0).unflatten(1, (-1, 4)).sum(dim=-1)
    assert (groups >= 2).all() and outcome.sparsity == pytest.approx(float((decoded == 0).float().mean()))
    assert outcome.rounded.error == pytest.approx(
        squared(w_OI - decoded, gram_II) / squared(w_OI, gram_II), rel=1e-3, abs=1e-9
    )
    # Rounding what was pruned, without making the error good elsewhere, loses more of it.
    pruned = PRUNERS.build(kind(pattern="2:4")).prune(w_OI, gram_II).w_OI
    simple.store(pruned)
    wanted = w_OI if kind is SparseGPTConfig else pruned
    assert squared(wanted - decoded, gram_II) <= 1.001 * squared(wanted - simple.decode(torch.float32), gram_II)


def gptq() -> Any:
    return CALIBRATORS.type_of("gptq")()


@pytest.mark.parametrize("rounder", [kind for kind in CALIBRATORS.types()])
def test_no_rounder_fills_a_zero(rounder: str) -> None:
    w_OI, x_NI = normal(12, 64), correlated(64)
    w_OI[normal(12, 64, seed=2) < 0] = 0
    module = empty(Int3Config(group_size=32), 12, 64)
    rounders.apply(ZerosKept(CALIBRATORS.build(CALIBRATORS.type_of(rounder)())), module, w_OI, [x_NI.T @ x_NI])
    assert not module.decode(torch.float32)[w_OI == 0].any()
    rounders.apply(CALIBRATORS.build(gptq()), module, w_OI, [x_NI.T @ x_NI])
    assert module.decode(torch.float32)[w_OI == 0].any()  # what the mask is for


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZERS.types().values() if kind is not KeepConfig])
def test_formats_with_an_exact_zero_are_found(kind: type[QuantConfig]) -> None:
    assert holds_zero(kind()) == (kind.name not in ("q4_1", "q5_1"))  # their blocks begin at a real minimum
    if "zero_point" in vars(kind()):
        assert not holds_zero(kind(zero_point="real", symmetric=False))  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [WandaConfig, SparseGPTConfig])
def test_dead_inputs_go_first(kind: type[SparseConfig]) -> None:
    w_OI, x_NI = normal(16, 64), correlated(64)
    x_NI[:, 10:30] = 0
    pruned = PRUNERS.build(kind(sparsity=0.5)).prune(w_OI, x_NI.T @ x_NI)
    assert not pruned.kept_OI[:, 10:30].any() and int((~pruned.kept_OI).sum()) == 16 * 32


def test_a_singular_hessian_is_damped_and_reported() -> None:
    w_OI, x_NI = normal(8, 64), normal(2, 64)
    pruned = SparseGPT().prune(w_OI, x_NI.T @ x_NI)
    assert pruned.w_OI.isfinite().all() and int((~pruned.kept_OI).sum()) == 8 * 32
    broken = torch.full((64, 64), torch.nan)
    broken.diagonal().fill_(1)
    pruned = SparseGPT().prune(w_OI, broken)
    assert pruned.note == "H is singular up to damping 1: pruned by magnitude" and pruned.w_OI.isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("config", [DenseConfig(), Int4Config(group_size=32), NF4Config()], ids=name)
@pytest.mark.parametrize("kind", METHODS)
def test_experts_are_pruned_each_on_its_own_inputs(
    kind: type[SparseConfig], config: QuantConfig, transposed: bool
) -> None:
    w_EOI, x_NI = normal(3, 16, 64), correlated(64)
    module = QUANTIZERS.build(config, 16, 64, experts=3, dtype=torch.float32, transposed=transposed)
    grams = [x_NI.T @ x_NI, None, x_NI.flip(1).T @ x_NI.flip(1)]
    outcome = prune(
        PRUNERS.build(kind(pattern="2:4")), RTN(), module, w_EOI.mT.contiguous() if transposed else w_EOI, grams
    )
    stored = module.dequantize(torch.float32)
    stored = stored.mT if transposed else stored
    assert ((stored == 0).unflatten(2, (-1, 4)).sum(dim=-1) >= 2).all()
    for number, gram in ((0, grams[0]), (2, grams[2])):
        alone = empty(config, 16, 64)
        prune(PRUNERS.build(kind(pattern="2:4")), RTN(), alone, w_EOI[number], [gram])
        if not isinstance(config, NF4Config):  # its nested scales are shared by all experts
            assert (stored[number] - alone.dequantize(torch.float32)).norm() <= 1e-4 * stored[number].norm()
    unseen = Magnitude(MagnitudeConfig(pattern="2:4")).by_magnitude(w_EOI[1])
    assert not stored[1][~unseen].any()
    if kind is not MagnitudeConfig:
        assert "1 of its experts: saw no inputs: pruned by magnitude" in outcome.rounded.note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_keep_their_dtype_and_zeros(dtype: torch.dtype) -> None:
    x_NI = correlated(64)
    module = QUANTIZERS.build(DenseConfig(), 8, 64, dtype=dtype)
    outcome = prune(SparseGPT(), RTN(), module, normal(8, 64).to(dtype), [x_NI.T @ x_NI])
    assert module.weight.dtype is dtype and outcome.sparsity == 0.5


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (WandaConfig, {"sparsity": 1.0}, "pruner.sparsity is 1.0: expected a share above 0 and below 1"),
        (WandaConfig, {"pattern": "4:2"}, "pruner.pattern is '4:2': expected N:M with 0 < N < M <= 128"),
        (WandaConfig, {"pattern": "124"}, "in quotes in YAML"),
        (MagnitudeConfig, {"pattern": "2:4", "sparsity": 0.6}, "pruner.pattern=2:4 is 0.5: leave one of them out"),
        (MagnitudeConfig, {"compare": "model"}, r"pruner.compare is 'model': expected layer \| row"),
        (SparseGPTConfig, {"damping": 0}, "pruner.damping is 0: expected a share above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(kind: type[SparseConfig], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kind(**settings)


def test_a_module_holds_codes() -> None:
    assert all(isinstance(empty(config, 8, 64), PackedWeight) for config in FORMATS)

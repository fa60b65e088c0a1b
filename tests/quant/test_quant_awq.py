"""AWQ: the error it reports is the error left, factors are each reader's own, outlier channels and clipping."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transform_models import Untouched, batches_of, logits, model_of, seen_by, transformed

from finetune.errors import ConfigError
from finetune.quant.affine import AffineLinear, Int3Config, Int4Config
from finetune.quant.dense import DenseConfig, DenseExperts, DenseLinear
from finetune.quant.driver import Driver
from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.quant.recipe import Recipe
from finetune.quant.rounders.gptq import GPTQ
from finetune.quant.rounders.rtn import RTN
from finetune.quant.transforms.awq import AWQ, AWQConfig
from finetune.quant.transforms.clip import SHARES, Clipping
from finetune.structure import inspect


def test_channels_of_one_value_head_share_their_factor() -> None:
    model = model_of("llama")
    before = model.model.layers[0].self_attn.o_proj.weight.clone()
    transformed(model, AWQ(), Int3Config(group_size=32))
    by_I = (model.model.layers[0].self_attn.o_proj.weight / before).median(0).values
    heads = by_I.unflatten(0, (2, 2, 8))  # of values, of queries that share one, features
    torch.testing.assert_close(heads[:, 0], heads[:, 1], rtol=1e-4, atol=1e-6)
    assert float(heads.detach().std()) > 1e-3


@pytest.mark.parametrize("formula", ["both", "paper", "duo"])
def test_awq_reports_the_error_that_its_factors_leave(formula: str) -> None:
    """Against float64 products of the model's own inputs with weights that the storage decodes to."""
    model, batches, quant = model_of("llama"), batches_of(), Int3Config(group_size=32)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.v_proj.weight.zero_()  # its rows are scaled once more, for what reads the values
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qk"]
    dense = {n: model.get_submodule(n).weight.detach().double() for n in names}
    x = seen_by(model, names[:1], batches)[names[0]].double()
    gain, plain = layer.input_layernorm.weight.detach().clone(), copy.deepcopy(model)
    transform = AWQ(AWQConfig(formula=formula, clip=False))
    Driver(model, inspect(model), Recipe(quant, transform=transform), batches).go()
    Driver(plain, inspect(plain), Recipe(quant), batches).go()
    by = (gain / layer.input_layernorm.weight.detach()).double()

    def error(of: Any, by: Tensor | float) -> float:
        kept = {n: of.get_submodule(n).dequantize(torch.float64) / by for n in names}
        lost = sum(float((x @ (kept[n] - w).T).square().sum()) for n, w in dense.items())
        return lost / sum(float((x @ w.T).square().sum()) for w in dense.values())

    found = transform.summary.folded["model.layers.0.input_layernorm"]
    assert found["error"] < found["error_unscaled"]
    assert found["error"] == pytest.approx(error(model, by), rel=1e-3)
    assert found["error_unscaled"] == pytest.approx(error(plain, 1.0), rel=1e-3)


def test_each_expert_has_factors_of_its_own_and_one_without_tokens_none() -> None:
    model = model_of("mixtral")
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    batches = [{"input_ids": torch.tensor([[5, 6]]), "use_cache": False}]
    transform = AWQ()
    Untouched(model, inspect(model), Recipe(Int3Config(group_size=32), transform=transform), batches).go()
    exponents = transform.summary.folded["model.layers.0.mlp.experts.gate_up_proj"]["exponent"]
    after = model.model.layers[0].mlp.experts.down_proj
    assert isinstance(after, DenseExperts) and len(exponents) == 4 and None in exponents
    same = [torch.equal(a, b) for a, b in zip(after.weight, before, strict=True)]
    assert same == [exponent is None for exponent in exponents] and not all(same)


@pytest.mark.parametrize("quant", [Int4Config(group_size=32), Int3Config(group_size=32), NF4Config(block_size=64)])
@pytest.mark.parametrize("rounder", [RTN(), GPTQ()], ids=["rtn", "gptq"])
def test_awq_saves_a_model_with_outlier_channels(quant: Any, rounder: Any) -> None:
    """Outliers are put in without a change of function: a norm's channels grow, and columns shrink."""
    model, batches = model_of("llama"), batches_of(rows=8, length=24)
    frozen = copy.deepcopy(model)
    freeze(frozen, DenseConfig(), inspect(frozen))
    assert isinstance(frozen.model.layers[0].mlp.up_proj, DenseLinear)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in ((layer.input_layernorm, "qkv"), (layer.post_attention_layernorm, ("gate", "up"))):
                norm.weight[:3] *= 20
                for name in readers:
                    at = layer.self_attn if norm is layer.input_layernorm else layer.mlp
                    getattr(at, f"{name}_proj").weight[:, :3] /= 20
    wanted = logits(model, batches)
    lost = {}
    for name, transform in (("awq", AWQ()), ("none", None)):
        twin = copy.deepcopy(model)
        Driver(twin, inspect(twin), Recipe(quant, rounder, transform=transform), batches).go()
        lost[name] = float((logits(twin, batches) - wanted).square().mean())
    assert lost["awq"] < 0.8 * lost["none"], lost


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_clipped_ranges_err_less_than_whole_ones_and_never_more(family: str) -> None:
    model, batches = model_of(family), batches_of(rows=8)
    lost = {}
    for clip in (True, False):
        twin = copy.deepcopy(model)
        transform = AWQ(AWQConfig(clip=clip, formula="paper"))
        layers = Driver(twin, inspect(twin), Recipe(Int3Config(group_size=32), transform=transform), batches).go()
        assert all(layer.error < layer.error_rtn if clip else layer.error == layer.error_rtn for layer in layers)
        lost[clip] = sum(layer.error for layer in layers)
    assert lost[True] < 0.9 * lost[False], lost


def test_ranges_are_searched_by_the_error_of_the_output_group_by_group() -> None:
    """Against every share tried on every group of a row alone, in float64."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 72) ** 3, torch.randn(40, 72)
    x[:, 0] = 0.0
    quant = Int3Config(group_size=32)
    module = AffineLinear(quant, 5, 72)
    grid = Clipping(quant, [x.T @ x]).fit(module, weight)
    decoded = grid.decode(Clipping(quant, [None]).choose(grid, weight, x.T @ x).codes_OI).double()  # type: ignore[union-attr]
    for first in (0, 32, 64):
        part, seen = weight[:, first : first + 32], x[:, first : first + 32].double()
        alone = AffineLinear(Int3Config(group_size=-1), 5, part.shape[-1])
        tops = part.abs().amax(-1, keepdim=True)
        tried = []
        for share in SHARES:
            ranges = alone.fit(part.clamp(-share * tops, share * tops))
            rounded = ranges.decode(ranges.round_columns(part, 0)).double()
            tried.append((seen @ (rounded - part).T).square().sum(0))
        found = (seen @ (decoded[:, first : first + 32] - part).T).square().sum(0)
        torch.testing.assert_close(found, torch.stack(tried).amin(0), rtol=1e-3, atol=1e-9)


def test_a_formula_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"transform.formula is 'papr': expected both \| paper \| duo; did you mean"):
        AWQConfig(formula="papr")

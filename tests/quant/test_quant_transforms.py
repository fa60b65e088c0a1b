"""Transforms: what can be scaled is found in every family, the function stays, factors are those of the papers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transform_models import FAMILIES, SIZES, Untouched, batches_of, logits, model_of, seen_by, spread, transformed

from finetune.errors import ConfigError
from finetune.quant.affine import Int4Config
from finetune.quant.driver import Driver
from finetune.quant.recipe import Recipe
from finetune.quant.transforms.awq import AWQ, AWQConfig
from finetune.quant.transforms.base import TRANSFORMS, Forward, Transform
from finetune.quant.transforms.fold import fold
from finetune.quant.transforms.gamma import Gamma
from finetune.quant.transforms.search import Search
from finetune.quant.transforms.smoothquant import SmoothQuant, SmoothQuantConfig
from finetune.structure import inspect
from finetune.structure.base import Projection, Structure

SEARCHED = ("llama", "gemma", "gpt2", "mixtral")
"""Families that AWQ is tried on as well: it folds as the others do, and searches long."""


class Random(Transform):
    """Folds in factors between 1/4 and 4 wherever any can be."""

    def block(self, driver: Driver, projections: list[Projection], forward: Forward) -> None:
        generator = torch.Generator().manual_seed(3)
        for scaling in self.scalings(driver, projections, forward):
            by_K = torch.exp2(torch.rand(4096, generator=generator) * 4 - 2)
            fold(driver.model, scaling, by_K[scaling.rows_I])
            self.summary.folded[scaling.source] = {}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_with_whatever_factors(family: str) -> None:
    model, batches = model_of(family), batches_of()
    wanted = logits(model, batches)
    kinds: dict[str, Transform] = {"random": Random(), "smoothquant": SmoothQuant(), "gamma": Gamma()}
    kinds |= {"awq": AWQ(AWQConfig(formula="paper"))} if family in SEARCHED else {}
    for name, transform in kinds.items():
        changed = copy.deepcopy(model)
        summary = transformed(changed, transform).summary
        assert float((logits(changed, batches) - wanted).abs().max()) <= 1e-4, name
        assert not summary.notes
        found = {source.rpartition(".")[2] for source in summary.folded}
        if name == "random":
            assert found == FAMILIES[family][2]
            changed_names = {p.rpartition(".")[0].rpartition(".")[2] for p in _differences(model, changed)}
            assert FAMILIES[family][2] <= changed_names
        else:
            assert found and found <= FAMILIES[family][2]


def _differences(before: Any, after: Any) -> list[str]:
    ours = after.state_dict()
    missing = [n for n, p in before.state_dict().items() if n in ours and not torch.equal(p, ours[n])]
    return [n if n.endswith((".weight", ".bias")) else f"{n}.weight" for n in missing]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma"])
def test_looking_leaves_no_trace(family: str) -> None:
    model = model_of(family)
    before = {name: p.clone() for name, p in model.state_dict().items()}

    class Looking(Transform):
        def block(self, driver: Driver, projections: list[Projection], forward: Forward) -> None:
            assert self.scalings(driver, projections, forward)

    transformed(model, Looking())
    after = model.state_dict()
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("dtype", "slack"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral"])
def test_half_precision_stays_within_its_rounding(family: str, dtype: torch.dtype, slack: float) -> None:
    model, batches = model_of(family).to(dtype), batches_of()
    wanted = logits(model, batches)
    assert {s.rpartition(".")[2] for s in transformed(model, Random()).summary.folded} == FAMILIES[family][2]
    difference = logits(model, batches) - wanted
    # A token near the border of two experts may change sides, so most of them are asked.
    assert float((difference.norm(dim=-1) / wanted.norm(dim=-1)).median()) <= slack


def test_a_norm_that_is_a_residual_too_stays_as_it_is() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=96, **SIZES)
    model = spread(transformers.BertForMaskedLM(config).eval())
    batches = [{"input_ids": torch.randint(3, 96, (3, 9))}]
    with torch.no_grad():
        wanted = model(**batches[0]).logits
    before = copy.deepcopy(model)
    transform = Gamma()
    Untouched(model, inspect(model), Recipe(Int4Config(group_size=32), transform=transform), batches).go()
    assert not transform.summary.folded and len(transform.summary.notes) == 2
    assert transform.summary.notes[0].endswith("something beside projections reads what it puts out")
    assert "layer.0.attention.output.LayerNorm" in transform.summary.notes[0]
    assert "layer.1.attention.output.LayerNorm" in transform.summary.notes[1]
    assert not _differences(before, model)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, wanted)


def test_weights_that_serve_elsewhere_stay() -> None:
    model = model_of("llama")
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    batches = batches_of()
    wanted = logits(model, batches)
    summary = transformed(model, Gamma()).summary
    assert {note.partition(" ")[0] for note in summary.notes} == {f"model.layers.{i}.input_layernorm" for i in (0, 1)}
    assert all("serves elsewhere" in note for note in summary.notes)
    assert float((logits(model, batches) - wanted).abs().max()) <= 1e-5


class _Mixture(nn.Module):
    """Experts in a list, each token to the one that its gate likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        chosen = self.gate(y).argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                out[chosen == number] = expert(y[chosen == number])
        return x + out


def test_experts_in_a_list_that_saw_no_token_are_scaled_like_the_others() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([_Mixture()])
    block: Any = model.blocks[0]
    many = torch.randn(64, 8)
    with torch.no_grad():
        few = many[block.gate(block.norm(many)).argmax(-1) == 0][:4]
        wanted = block(many)
    names = [f"blocks.0.experts.{i}" for i in range(3)]
    structure = Structure(
        ("blocks.0",), tuple(Projection(n, "linear", 8, 8, block=0) for n in names), None, None, False
    )
    (found,) = Search(model, structure).scalings("blocks.0", lambda: block(few))
    assert found.source == "blocks.0.norm" and set(found.readers) == {"blocks.0.gate", *names}
    fold(model, found, torch.rand(8) * 3 + 0.3)
    with torch.no_grad():
        torch.testing.assert_close(block(many), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant_is_the_papers_formula(alpha: float) -> None:
    model, batches = model_of("llama"), batches_of()
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    x, weights = seen_by(model, names, batches)[names[0]], [model.get_submodule(n).weight.clone() for n in names]
    gain = model.model.layers[0].input_layernorm.weight.clone()
    transformed(model, SmoothQuant(SmoothQuantConfig(alpha=alpha)))
    inputs, columns = x.abs().amax(0), torch.cat(weights).abs().amax(0)
    wanted = inputs**alpha / columns ** (1 - alpha)
    torch.testing.assert_close(gain / model.model.layers[0].input_layernorm.weight, wanted, rtol=1e-4, atol=1e-6)
    for name, weight in zip(names, weights, strict=True):
        torch.testing.assert_close(model.get_submodule(name).weight, weight * wanted, rtol=1e-4, atol=1e-6)
    smoothed = seen_by(model, names, batches)[names[0]].abs().amax(0)
    if alpha == 1:
        torch.testing.assert_close(smoothed, torch.ones_like(smoothed), rtol=1e-4, atol=1e-4)
    if alpha == 0:
        left = torch.cat([model.get_submodule(n).weight for n in names]).abs().amax(0)
        torch.testing.assert_close(left, torch.ones_like(left), rtol=1e-4, atol=1e-4)


def test_smoothing_twice_is_smoothing_once() -> None:
    model = model_of("qwen2_moe")
    transformed(model, SmoothQuant())
    once = {name: p.clone() for name, p in model.state_dict().items()}
    transformed(model, SmoothQuant())
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(parameter, once[name], rtol=1e-3, atol=1e-4, msg=name)


def test_gamma_moves_into_the_columns_but_where_it_is_zero() -> None:
    model, batches = model_of("gpt2"), batches_of()
    norm = model.transformer.h[0].ln_1
    with torch.no_grad():
        norm.weight[5] = 0.0
        norm.weight[6] *= -1
    wanted, gain, offset = logits(model, batches), norm.weight.clone(), norm.bias.clone()
    weight = model.transformer.h[0].attn.c_attn.weight.clone()
    transformed(model, Gamma())
    moved = gain.where(gain != 0, torch.ones_like(gain))
    torch.testing.assert_close(norm.weight, gain / moved)
    torch.testing.assert_close(norm.bias, offset / moved)
    torch.testing.assert_close(model.transformer.h[0].attn.c_attn.weight[:, :32], (weight * moved[:, None])[:, :32])
    assert float((logits(model, batches) - wanted).abs().max()) <= 1e-4
    gemma = model_of("gemma")
    transformed(gemma, Gamma())
    assert float(gemma.model.layers[0].input_layernorm.weight.abs().max()) < 1e-6


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"transform.alpha is 1.5: expected 0"):
        SmoothQuantConfig(alpha=1.5)
    assert set(TRANSFORMS.types()) >= {"none", "awq", "smoothquant", "gamma"}

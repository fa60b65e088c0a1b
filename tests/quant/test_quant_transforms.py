"""Transforms: what can be scaled is found in every family, the function stays, factors are those of the papers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.quant.affine import AffineLinear, Int3Config, Int4Config
from finetune.quant.dense import DenseConfig, DenseExperts, DenseLinear
from finetune.quant.driver import Driver
from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.quant.rounders.gptq import GPTQ
from finetune.quant.rounders.rtn import RTN
from finetune.quant.transforms.awq import AWQ, AWQConfig
from finetune.quant.transforms.base import TRANSFORMS, Forward, Transform
from finetune.quant.transforms.clip import SHARES, Clipping
from finetune.quant.transforms.fold import fold
from finetune.quant.transforms.gamma import Gamma
from finetune.quant.transforms.search import Search
from finetune.quant.transforms.smoothquant import SmoothQuant, SmoothQuantConfig
from finetune.structure import inspect
from finetune.structure.base import Projection, Structure

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GQA = SIZES | {"num_key_value_heads": 2}
HEADS = GQA | {"head_dim": 8}
OLD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GATED = {"input_layernorm", "post_attention_layernorm", "v_proj", "up_proj"}
GEMMA2 = {"input_layernorm", "pre_feedforward_layernorm", "v_proj", "up_proj"}
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("Llama", GQA, GATED),
    "mistral": ("Mistral", GQA | {"sliding_window": 8}, GATED),
    "qwen2": ("Qwen2", GQA, GATED),
    "qwen3": ("Qwen3", HEADS, GATED),
    "gemma": ("Gemma", HEADS, GATED),
    "gemma2": ("Gemma2", HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 8}, GEMMA2),
    "gemma3": ("Gemma3Text", HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 8}, GEMMA2),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, {"ln_1", "ln_2", "c_attn"}),
    "opt": ("OPT", OLD | {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 64},
            {"self_attn_layer_norm", "final_layer_norm", "v_proj", "fc1"}),
    "phi": ("Phi", SIZES, {"input_layernorm", "v_proj"}),
    "phi3": ("Phi3", GQA, {"input_layernorm", "post_attention_layernorm", "qkv_proj", "gate_up_proj"}),
    "glm": ("Glm", HEADS, {"input_layernorm", "post_attention_layernorm", "v_proj", "gate_up_proj"}),
    "glm4": ("Glm4", HEADS, {"input_layernorm", "post_attention_layernorm", "v_proj", "gate_up_proj"}),
    "falcon": ("Falcon", OLD, {"input_layernorm", "query_key_value"}),
    "falcon_new": ("Falcon", OLD | {"new_decoder_architecture": True, "num_kv_heads": 2},
                   {"ln_attn", "ln_mlp", "query_key_value"}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4},
              {"input_layernorm", "post_attention_layernorm", "query_key_value"}),
    "gpt_neox": ("GPTNeoX", SIZES, {"input_layernorm", "post_attention_layernorm", "query_key_value"}),
    "mixtral": ("Mixtral", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
                {"input_layernorm", "post_attention_layernorm", "v_proj", "gate_up_proj"}),
    "qwen2_moe": ("Qwen2Moe", GQA | MOE | {"shared_expert_intermediate_size": 48}, GATED | {"gate_up_proj"}),
    "qwen3_moe": ("Qwen3Moe", HEADS | MOE, GATED - {"up_proj"} | {"gate_up_proj"}),
    "gpt_oss": ("GptOss", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}, GATED - {"up_proj"}),
    "deepseek_v3": ("DeepseekV3", SIZES | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1, "kv_lora_rank": 16,
        "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        GATED - {"v_proj"} | {"gate_up_proj", "q_a_layernorm", "kv_a_layernorm", "kv_b_proj"}),
}  # fmt: skip
"""Class of the configuration, settings, and the last parts of the names of what gives tensors that can be scaled."""

SEARCHED = ("llama", "gemma", "gpt2", "mixtral")
"""Families that AWQ is tried on as well: it folds as the others do, and searches long."""


def model_of(family: str, task: str = "CausalLM", **settings: Any) -> Any:
    """A dense model with random weights and norms that differ from 1."""
    name, own, _ = FAMILIES[family]
    torch.manual_seed(0)
    common = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**common, **own, **settings)
    return spread(getattr(transformers, f"AutoModelFor{task}").from_config(config).eval())


def spread(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.mul_(3)
    return model


def batches_of(rows: int = 4, length: int = 12) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"input_ids": torch.randint(3, 96, (rows, length), generator=generator), "use_cache": False} for _ in range(2)
    ]


@torch.no_grad()
def logits(model: nn.Module, batches: list[dict[str, Any]]) -> Tensor:
    return torch.cat([model(**batch).logits for batch in batches]).float()


class Untouched(Driver):
    """Transforms blocks and quantizes nothing."""

    def _quantize(self, p: Projection, grams: Any) -> None:
        pass


class Random(Transform):
    """Folds in factors between 1/4 and 4 wherever any can be."""

    def block(self, driver: Driver, projections: list[Projection], forward: Forward) -> None:
        generator = torch.Generator().manual_seed(3)
        for scaling in self.scalings(driver, projections, forward):
            by_K = torch.exp2(torch.rand(4096, generator=generator) * 4 - 2)
            fold(driver.model, scaling, by_K[scaling.rows_I])
            self.summary.folded[scaling.source] = {}


def transformed(model: Any, transform: Transform, quant: Any = None) -> Transform:
    Untouched(model, inspect(model), quant or Int4Config(group_size=32), RTN(), batches_of(), transform=transform).go()
    return transform


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
    Untouched(model, inspect(model), Int4Config(group_size=32), RTN(), batches, transform=transform).go()
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


def seen_by(model: Any, names: list[str], batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What projections read, [N, I]."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _m, a, n=n: seen[n].append(a[0].flatten(0, -2)))
        for n in names
    ]
    logits(model, batches)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


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
    Driver(model, inspect(model), quant, RTN(), batches, transform=transform).go()
    Driver(plain, inspect(plain), quant, RTN(), batches).go()
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
    Untouched(model, inspect(model), Int3Config(group_size=32), RTN(), batches, transform=transform).go()
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
        Driver(twin, inspect(twin), quant, rounder, batches, transform=transform).go()
        lost[name] = float((logits(twin, batches) - wanted).square().mean())
    assert lost["awq"] < 0.8 * lost["none"], lost


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_clipped_ranges_err_less_than_whole_ones_and_never_more(family: str) -> None:
    model, batches = model_of(family), batches_of(rows=8)
    lost = {}
    for clip in (True, False):
        twin = copy.deepcopy(model)
        transform = AWQ(AWQConfig(clip=clip, formula="paper"))
        layers = Driver(twin, inspect(twin), Int3Config(group_size=32), RTN(), batches, transform=transform).go()
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


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"transform.formula is 'papr': expected both \| paper \| duo; did you mean"):
        AWQConfig(formula="papr")
    with pytest.raises(ConfigError, match=r"transform.alpha is 1.5: expected 0"):
        SmoothQuantConfig(alpha=1.5)
    assert set(TRANSFORMS.types()) >= {"none", "awq", "smoothquant", "gamma"}

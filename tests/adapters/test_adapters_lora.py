"""LoRA itself: gradients, scaling, dropout, initial values, targets, whole modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from adapters_models import DECODERS as FAMILIES
from adapters_models import bits, dense_twin, frozen, ids, logits, lora, make
from torch import Tensor, nn

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.lora_layers import LoRAExperts, LoRALinear
from finetune.errors import ConfigError
from finetune.kernels.dropout import draw_kept, zero_dropped
from finetune.quant.dense import DenseConfig, DenseLinear
from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.structure import inspect

QUANTS = {"dense": DenseConfig, "nf4": NF4Config}


def loss(model: nn.Module) -> Tensor:
    return model(ids(), labels=ids(), use_cache=False).loss


def product(module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """s B A as an independent formula: einsum over PEFT's layouts."""
    if isinstance(module, LoRAExperts):
        a, b = a.reshape(module.num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, module.num_experts)
        return module.scaling * torch.einsum("ore,eri->e" + ("io" if module.transposed else "oi"), b, a)
    return module.scaling * torch.einsum("or,ri->" + ("io" if module.transposed else "oi"), b, a)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_gradients_equal_float64_autograd(family: str, quant: str) -> None:
    model, adapter = lora(family, quant)
    loss(model).backward()
    dense = dense_twin(family, quant).double()
    leaves: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = dict(dense.named_parameters())
    for projection in adapter.projections:
        module = adapter.adapted[projection.name]
        a, b = (p.detach().double().requires_grad_() for p in (module.lora_A.weight, module.lora_B.weight))
        leaves[f"{projection.name}.lora_A.weight"], leaves[f"{projection.name}.lora_B.weight"] = a, b
        key = projection.name if projection.kind == "experts" else f"{projection.name}.weight"
        weights[key] = weights[key].detach() + product(module, a, b)
    out = torch.func.functional_call(dense, weights, (ids(),), {"labels": ids(), "use_cache": False})
    out.loss.backward()
    assert set(leaves) == set(adapter.trainable())
    for name, parameter in adapter.trainable().items():
        wanted = leaves[name].grad
        assert (parameter.grad - wanted).norm() / wanted.norm() <= 1e-5, name


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_scaling(rslora: bool, scaling: float) -> None:
    model, _ = lora(rslora=rslora)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    low_rank = x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    assert torch.allclose(layer(x), layer.base(x) + scaling * low_rank, atol=1e-6)


def test_the_start_is_decided_by_the_seed_and_has_the_right_spread() -> None:
    def start(seed: int, dtype: str = "fp32") -> dict[str, Tensor]:
        torch.manual_seed(seed)
        adapter = attach(frozen("llama"), LoRAConfig(rank=8, dtype=dtype))
        return {name: p.detach() for name, p in adapter.trainable().items()}

    first, again, other, half = start(5), start(5), start(6), start(5, "bf16")
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor.bfloat16(), half[name])
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other[name])
            # kaiming_uniform(a = sqrt 5): uniform within 1 / sqrt(I)
            bound = 1 / math.sqrt(tensor.shape[1])
            assert 0.8 * bound < tensor.abs().max() <= bound


def test_dropout_falls_on_the_input_of_a_alone_and_only_in_training() -> None:
    torch.manual_seed(0)
    base = DenseLinear(64, 64)
    base.store(torch.randn(64, 64))
    layer = LoRALinear(base, rank=4, scaling=1.0, dropout=0.5)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(7, 64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.allclose(layer(x), base(x) + x @ layer.lora_A.weight.T @ layer.lora_B.weight.T, atol=1e-5)
    layer.train()
    torch.manual_seed(1)
    seen = layer(x) - base(x)
    torch.manual_seed(1)
    wanted = zero_dropped(x, draw_kept(x, 0.5)) / 0.5 @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    assert torch.allclose(seen, wanted, atol=1e-5)


def test_a_model_in_eval_mode_gets_no_dropout_from_attaching() -> None:
    model, _ = lora(dropout=0.5)
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("quant", QUANTS)
def test_a_layer_compiles_without_a_break(quant: str) -> None:
    model, _ = lora("llama", quant)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features, requires_grad=True)
    leaves = (x, layer.lora_A.weight, layer.lora_B.weight)
    wanted = torch.autograd.grad(layer(x).square().sum(), leaves)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for found, right in zip(torch.autograd.grad(compiled(x).square().sum(), leaves), wanted, strict=True):
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_have_dropout_too(family: str) -> None:
    model, _ = lora(family, dropout=0.5, targets=["experts.*"])
    calm = logits(model)
    assert torch.equal(calm, logits(model))
    for module in model.modules():
        if isinstance(module, LoRAExperts):
            module.train()
    assert not torch.allclose(logits(model), calm, atol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_one_expert_as_an_operand_and_as_a_dense_weight(family: str) -> None:
    model, _ = lora(family)
    for module in model.modules():
        if not isinstance(module, LoRAExperts):
            continue
        merged = module.merge(module.dequantize(torch.float32))
        for expert in (2, torch.tensor(2)):
            weight = module[expert]
            x = torch.randn(5, module.in_features)
            wanted = x @ (merged[2] if module.transposed else merged[2].T)
            got = x @ weight if module.transposed else F.linear(x, weight)
            assert torch.allclose(got, wanted, atol=1e-5)
            assert torch.allclose(weight.dense(), merged[2], atol=1e-6)
            assert weight.shape == merged[2].shape
            # a use that has no shortcut goes through the dense sum
            assert torch.allclose(torch.relu(weight), torch.relu(merged[2]), atol=1e-6)
        assert not torch.equal(merged, module.dequantize(torch.float32))


def test_small_products_survive_a_16_bit_expert() -> None:
    """Added into a bf16 weight, a product below half a step of the weight would vanish; here it must not."""
    model, _ = lora("mixtral", targets=["experts.down_proj"])
    model.to(torch.bfloat16)
    module = next(m for m in model.modules() if isinstance(m, LoRAExperts))
    with torch.no_grad():
        module.base.weight.fill_(1.0)
        module.lora_A.weight.data = torch.zeros_like(module.lora_A.weight, dtype=torch.float32)
        module.lora_A.weight[:, 0] = 1.0
        module.lora_B.weight.data = torch.full_like(module.lora_B.weight, 1e-4, dtype=torch.float32)
        x = torch.zeros(1, module.in_features, dtype=torch.bfloat16)
        x[0, :2] = torch.tensor([1.0, -1.0])
        difference = F.linear(x, module[0]) - F.linear(x, module.base[0])
        assert torch.equal(module[0].dense(), module.base[0])
    assert difference.abs().max() > 0


@pytest.mark.parametrize("quant", QUANTS)
def test_bf16_activations_with_fp32_factors(quant: str) -> None:
    base = make("llama").to(torch.bfloat16)
    freeze(base, QUANTS[quant](), inspect(base))
    before = logits(base)
    adapter = attach(base, LoRAConfig(rank=4, train_also=["lm_head", "embed_tokens", "norm"]))
    assert before.dtype == torch.bfloat16
    assert torch.equal(bits(logits(base)), bits(before))
    loss(base).backward()
    assert {p.dtype for p in adapter.trainable().values()} == {torch.float32}
    assert {p.grad.dtype for p in adapter.trainable().values()} == {torch.float32}
    with adapter.disabled():
        assert torch.equal(bits(logits(base)), bits(before))


def test_adapter_dtype_bf16() -> None:
    model = frozen("llama")
    adapter = attach(model, LoRAConfig(rank=4, dtype="bf16", train_also=["lm_head"]))
    loss(model).backward()
    assert {p.grad.dtype for p in adapter.trainable().values()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_does_not_starve_the_adapter(family: str, quant: str) -> None:
    """The embedding is frozen, so the first block's input asks for no gradient."""
    model, adapter = lora(family, quant)
    model.train()
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss(model).backward()
    wanted = {name: p.grad.clone() for name, p in adapter.trainable().items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss(model).backward()
    for name, parameter in adapter.trainable().items():
        assert parameter.grad.abs().max() > 0, name
        assert torch.equal(parameter.grad, wanted[name]), name


TARGETS = {
    "q_proj": 2,
    "self_attn.q_proj": 2,
    "layers.1.self_attn.q_proj": 1,
    "model.layers.1.self_attn.q_proj": 1,
    "*.mlp.*": 6,
    "[qk]_proj": 4,
    "layers.0.*": 7,
    "lm_head": 1,
}


@pytest.mark.parametrize("pattern", TARGETS)
def test_a_pattern_is_a_name_an_ending_or_a_glob(pattern: str) -> None:
    adapter = attach(frozen("llama"), LoRAConfig(rank=4, targets=[pattern]))
    assert len(adapter.trainable()) == 2 * TARGETS[pattern]


def test_all_linear_leaves_the_head_alone_and_takes_the_experts() -> None:
    names = set(attach(frozen("mixtral"), LoRAConfig(rank=4)).trainable())
    assert any("experts.gate_up_proj" in name for name in names)
    assert not any("lm_head" in name or "gate.weight" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_proj", "v_porj"]}, r"'v_porj' matches no projection.*have .*q_proj.*did you mean 'v_proj'"),
        ({"targets": ["layers.7.*"]}, r"'layers\.7\.\*' matches no projection"),
        ({"targets": ["proj"]}, "'proj' matches no projection"),
        ({"rank": 65}, r"adapter\.rank is 65.*is 64 x 64.*at most 64"),
        ({"rank": 40}, r"adapter\.rank is 40.*k_proj is 32 x 64.*at most 32"),
        ({"train_also": ["lm_haed"]}, "'lm_haed' matches no module.*did you mean 'lm_head'"),
        ({"train_also": ["mlp"]}, r"layers\.0\.mlp holds the projections .*gate_proj"),
        ({"targets": ["lm_head"], "train_also": ["lm_head"]}, "both name lm_head"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict, message: str) -> None:
    model = frozen("llama")
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=message) as raised:
        attach(model, LoRAConfig(**settings))
    assert "\n" not in str(raised.value)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
@pytest.mark.parametrize("quant", QUANTS)
def test_a_checkpoint_alone_never_refuses_a_rank_that_the_model_takes(family: str, quant: str) -> None:
    """By what is stored for one: dense or packed names and shapes, experts apart or stacked."""
    model = make(family)
    most = min(min(p.in_features, p.out_features) for p in inspect(model).projections)
    if quant != "dense":
        freeze(model, QUANTS[quant](), inspect(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if quant == "dense":
        # As published: one file a matrix, whatever the model makes of them.
        shapes |= {f"{n}.{e}": s[1:] for n, s in shapes.items() if len(s) == 3 for e in range(s[0])}
        shapes = {name: shape for name, shape in shapes.items() if len(shape) < 3}
    LoRAConfig(rank=most).check_stored(shapes)
    with pytest.raises(ConfigError, match=r"adapter\.rank is 100000.*no matrix with a side above"):
        LoRAConfig(rank=100000).check_stored(shapes)
    LoRAConfig(rank=100000).check_stored({"wte.weight": (8, 8)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"adapter\.rank is 0: expected at least 1"),
        ({"alpha": 0.0}, r"adapter\.alpha is 0\.0"),
        ({"alpha": float("nan")}, r"adapter\.alpha is nan"),
        ({"dropout": 1.0}, r"adapter\.dropout is 1\.0"),
        ({"dtype": "fp23"}, r"adapter\.dtype is 'fp23': expected fp32 \| bf16; did you mean 'fp32'"),
        ({"targets": "q_proj"}, r"adapter\.targets is 'q_proj'.*did you mean \[q_proj\]"),
        ({"targets": []}, r"adapter\.targets is \[\]: expected at least one"),
        ({"targets": [3]}, r"adapter\.targets is \[3\]"),
        ({"train_also": "lm_head"}, r"adapter\.train_also is 'lm_head': expected a list"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**settings)


@pytest.mark.parametrize(
    "settings", [{"train_also": ["lm_head"]}, {"train_also": ["wte"]}, {"targets": ["lm_head"]}], ids=str
)
def test_tied_weights_are_not_torn(settings: dict) -> None:
    with pytest.raises(ConfigError, match=r"lm_head.*transformer\.wte|transformer\.wte.*lm_head"):
        attach(frozen("gpt2"), LoRAConfig(**settings))


def test_a_trained_pair_stays_one_tensor() -> None:
    model = frozen("gpt2")
    adapter = attach(model, LoRAConfig(rank=4, train_also=["lm_head", "wte"]))
    assert model.lm_head.trained.weight is model.transformer.wte.trained.weight
    loss(model).backward()
    torch.optim.SGD(adapter.trainable().values(), lr=0.1).step()
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    merged = dict(adapter.merged())
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
    stored = frozen("gpt2")
    assert torch.equal(model.transformer.wte.base.weight, stored.transformer.wte.weight)
    assert not torch.equal(merged["lm_head.weight"], stored.lm_head.weight)


def test_a_quantized_head_trains_as_its_decoded_copy() -> None:
    model = make("llama", tie_word_embeddings=False)
    freeze(model, NF4Config(head=True), inspect(model))
    before = logits(model)
    adapter = attach(model, LoRAConfig(rank=4, train_also=["lm_head"]))
    assert torch.allclose(logits(model), before, atol=1e-6)
    assert dict(adapter.merged())["lm_head.weight"].shape == (96, 64)


def test_a_dense_model_straight_from_transformers_can_be_adapted() -> None:
    model = make("llama")
    before = logits(model)
    adapter = attach(model, LoRAConfig(rank=4))
    assert torch.equal(bits(logits(model)), bits(before))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter.trainable())


def test_a_second_adapter_is_refused() -> None:
    model, _ = lora()
    with pytest.raises(ConfigError, match="attached already"):
        attach(model, LoRAConfig())


def test_disabling_nests_and_ends_with_an_error() -> None:
    model, adapter = lora()
    moved = logits(model)
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        with adapter.disabled():
            pass
        assert not torch.equal(logits(model), moved)
        raise RuntimeError("inside")
    assert torch.equal(logits(model), moved)
    with pytest.raises(RuntimeError, match="inside"), adapter.detached():
        raise RuntimeError("inside")
    assert torch.equal(logits(model), moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_structure_of_an_adapted_model_is_that_of_its_base(family: str) -> None:
    base = inspect(frozen(family))
    tied = {"train_also": ["lm_head", base.embeddings]}
    model, _ = lora(family, **tied)
    assert inspect(model) == base


def test_merging_does_not_touch_the_stored_weights() -> None:
    model, adapter = lora("mixtral", train_also=["lm_head"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _, weight in adapter.merged():
        weight.zero_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name

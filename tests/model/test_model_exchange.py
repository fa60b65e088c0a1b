"""Exchanged modules give what the originals gave, names stay, and what is not understood stays and works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.data.batching import collate, packed_mask
from finetune.data.rows import Row, TokenRows
from finetune.kernels import native
from finetune.model.config import ModelConfig
from finetune.model.exchange import Exchanged, candidates, exchange, notes, summary, why_not
from finetune.model.fused_modules import FusedGatedMLP, FusedModule, FusedNorm, FusedRotaryAttention
from finetune.model.load import load
from finetune.quant.dense import DenseConfig
from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.structure import inspect

pytestmark = pytest.mark.skipif(
    native.level() not in ("avx512", "avx512_bf16", "amx"), reason="nothing is exchanged below AVX512"
)

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
GROUPED: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0
}  # fmt: skip
OPT: dict[str, Any] = {
    **SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    # what is exchanged: norms, gated MLPs, attention functions, rotary attention modules
    "Llama": (GROUPED, {"norm": 5, "gated MLP": 2, "attention": 2, "rotary attention": 2}),
    "Qwen3": (GROUPED | {"head_dim": 16}, {"norm": 9, "gated MLP": 2, "attention": 2, "rotary attention": 2}),
    "Mistral": (GROUPED | {"sliding_window": 5}, {"norm": 5, "gated MLP": 2, "attention": 2, "rotary attention": 2}),
    "Gemma2": (GROUPED | {"head_dim": 8, "attn_implementation": "eager"}, {"norm": 9, "gated MLP": 2}),  # softcaps
    "Gemma3Text": (
        GROUPED | {"head_dim": 8, "sliding_window": 5},
        {"norm": 13, "gated MLP": 2, "attention": 2, "rotary attention": 2},
    ),
    "Phi3": (GROUPED, {"norm": 5, "gated MLP": 2, "attention": 2}),  # one projection for q, k and v
    "Olmo2": (GROUPED, {"norm": 9, "gated MLP": 2, "attention": 2}),  # norms over all heads
    "Mixtral": (GROUPED | {"num_local_experts": 4}, {"norm": 5, "attention": 2, "rotary attention": 2}),
    "GPT2": (GPT2, {"attention": 2}),
    "OPT": (OPT, {"attention": 2}),
}
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 8e-2)}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose vectors (norms, biases) say something too."""
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**FAMILIES[family][0] | changes)
    model = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def ids(length: int = 17) -> Tensor:
    return torch.randint(64, (2, length), generator=torch.Generator().manual_seed(3))


def results(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(input_ids=ids(), use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids()[:, 1:].flatten()).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def counts(done: list[Exchanged]) -> dict[str, int]:
    kinds = [one.kind for one in done if not one.reason]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def relative(found: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """The largest error in units of the largest value, or of `least` where that is more."""
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / max(float(wanted.abs().max()), least))


def check_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Each by its own size, or a hundredth of the largest: that of a bias on keys is 0 but for rounding."""
    least = 1e-2 * max(float(gradient.abs().max()) for gradient in wanted.values())
    assert found.keys() == wanted.keys()
    worst = {name: relative(found[name], gradient, least) for name, gradient in wanted.items()}
    assert max(worst.values()) <= tolerance, worst


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_stay(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    names, modes = list(model.state_dict()), [module.training for module in model.modules()]
    parameters = dict(model.named_parameters())
    logits, gradients = results(model)
    done = exchange(model)
    assert counts(done) == FAMILIES[family][1] and notes(done) == []
    assert list(model.state_dict()) == names and [module.training for module in model.modules()] == modes
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    fused_logits, fused_gradients = results(model)
    on_logits, on_gradients = TOLERANCE[dtype]
    assert relative(fused_logits, logits) <= on_logits
    check_gradients(fused_gradients, gradients, on_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_stay_apart(dtype: torch.dtype) -> None:
    model = tiny("Mistral", dtype)
    exchange(model)
    rows = TokenRows.of([Row(row, row) for row in (ids(24)[0].numpy(), ids(24)[1, :13].numpy())])
    inputs = collate(rows, [[0, 1]], 0).model_inputs()
    with torch.no_grad():
        packed = model(**inputs).logits[0, 24:]
        alone = model(**collate(rows, [[1]], 0).model_inputs()).logits[0]
        changed = dict(
            inputs, input_ids=torch.cat([inputs["input_ids"][:, :24].flip(1), inputs["input_ids"][:, 24:]], 1)
        )
        assert torch.equal(model(**changed).logits[0, 24:], packed)
    assert relative(packed, alone) <= TOLERANCE[dtype][0]


def test_explicit_float_masks_and_padding_still_work() -> None:
    model, original = tiny("Llama", torch.bfloat16), tiny("Llama", torch.bfloat16)
    exchange(model)
    rows = TokenRows.of([Row(row, row) for row in (ids(24)[0].numpy(), ids(24)[1, :13].numpy())])
    packed, padded = collate(rows, [[0, 1]], 0), collate(rows, [[0], [1]], 0)
    with torch.no_grad():
        for inputs in (
            packed.model_inputs() | {"attention_mask": packed_mask(packed, torch.bfloat16)}, padded.model_inputs()
        ):  # fmt: skip
            assert relative(model(**inputs).logits[:, :13], original(**inputs).logits[:, :13]) <= 3e-2


def test_decoding_with_a_cache_gives_the_same_tokens() -> None:
    model, original = tiny("Qwen3"), tiny("Qwen3")
    exchange(model)
    for one in (model, original):
        one.generation_config.pad_token_id = 0
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    assert torch.equal(model.generate(ids(5), **options), original.generate(ids(5), **options))


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Phi3", "Mixtral"])
def test_adapters_on_a_frozen_base_see_what_they_saw(family: str) -> None:
    def adapted(fused: bool) -> tuple[Any, Any]:
        model = tiny(family)
        freeze(model, NF4Config(), inspect(model))
        if fused:
            assert counts(exchange(model)) == FAMILIES[family][1]
        torch.manual_seed(1)
        return model, attach(model, LoRAConfig(rank=4))

    (fused, ours), (plain, theirs) = adapted(True), adapted(False)
    assert list(ours.trainable()) == list(theirs.trainable()) and list(ours.file_keys()) == list(theirs.file_keys())
    found, wanted = results(fused), results(plain)
    assert relative(found[0], wanted[0]) <= 1e-5
    check_gradients(found[1], wanted[1], 1e-5)
    with ours.detached(), theirs.detached():
        assert list(fused.state_dict()) == list(plain.state_dict())
    assert inspect(fused) == inspect(plain)


def test_a_norm_trained_beside_the_adapter_gets_its_gradient() -> None:
    model = tiny("Llama")
    exchange(model)
    adapter = attach(model, LoRAConfig(rank=4, train_also=["norm"]))
    model(input_ids=ids(), use_cache=False).logits.sum().backward()
    (name,) = [name for name in adapter.trainable() if "norm" in name]
    gradient = adapter.trainable()[name].grad
    assert gradient is not None and bool(gradient.abs().sum() > 0)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = tiny("Llama", torch.bfloat16)
    exchange(model)
    model.train()
    plain = results(model)[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = results(model)[1]
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_stand_ins_are_of_the_original_class_and_compile() -> None:
    model = tiny("Llama")
    exchange(model)
    layer = model.model.layers[0]
    for module, fused, original in (
        (layer.mlp, FusedGatedMLP, "LlamaMLP"), (layer.self_attn, FusedRotaryAttention, "LlamaAttention"),
        (layer.input_layernorm, FusedNorm, "LlamaRMSNorm"),
    ):  # fmt: skip
        assert isinstance(module, fused) and original in [kind.__name__ for kind in type(module).__mro__]
    x = torch.randn(1, 3, 32)
    compiled = torch.compile(nn.Sequential(layer.input_layernorm, layer.mlp), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer.mlp(layer.input_layernorm(x)))


class Twisted(nn.Module):
    """Looks like a gated MLP, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 48), nn.Linear(32, 48)
        self.c, self.act = nn.Linear(48, 32), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x) + 1)


class Dropping(Twisted):
    """Drops activations, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.dropout(self.act(self.a(x)) * self.b(x), 0.5, self.training))


class Squared(Twisted):
    """Gates with something else."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x))


@pytest.mark.parametrize(
    ("kind", "said"), [(Twisted, "something else"), (Dropping, "something else"), (Squared, "its activation is not")]
)
def test_a_module_that_only_looks_like_a_gated_mlp_stays(kind: type[nn.Module], said: str) -> None:
    model = tiny("Llama")
    model.model.layers[1].mlp = kind()
    done = exchange(model)
    assert type(model.model.layers[1].mlp) is kind and isinstance(model.model.layers[0].mlp, FusedGatedMLP)
    (line,) = notes(done)
    assert line.startswith("1 x gated MLP stays as transformers has it: ") and said in line
    assert summary(done) == "fused kernels compute 5 x norm, 1 x gated MLP, 2 x attention, 2 x rotary attention"


def test_gates_are_told_from_ups_whatever_their_order() -> None:
    class Swapped(Twisted):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(x)) * self.a(x))

    model = tiny("Llama", torch.bfloat16)
    mlp = model.model.layers[0].mlp = Swapped().bfloat16()
    exchange(model)
    fused, x = model.model.layers[0].mlp, torch.randn(2, 3, 32).bfloat16() * 5
    assert isinstance(fused, FusedGatedMLP) and relative(fused(x), mlp(x)) < 3e-2


class Centred(nn.Module):
    """A norm that looks like an RMSNorm and subtracts the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(32)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (32,), self.weight, eps=self.eps)


def test_a_norm_that_is_none_stays_and_hooked_ones_are_left_alone() -> None:
    model = tiny("Llama")
    model.model.layers[0].input_layernorm = Centred()
    model.model.norm.register_forward_hook(lambda *_: None)
    done = exchange(model)
    assert notes(done) == ["1 x norm stays as transformers has it: it is no RMSNorm"]
    assert not isinstance(model.model.norm, FusedModule)


def test_nothing_is_exchanged_where_it_would_not_help() -> None:
    model = tiny("Llama", torch.float16)
    assert exchange(model) == [] and "float16" in why_not(model)
    with native.at_most("avx2"):
        assert exchange(tiny("Llama")) == [] and "AVX512" in why_not(tiny("Llama"))


def test_the_saved_configuration_does_not_name_our_attention(tmp_path: Path) -> None:
    model = tiny("Llama")
    model.save_pretrained(tmp_path / "before")
    exchange(model)
    assert model.config._attn_implementation == "finetune"
    model.save_pretrained(tmp_path / "after")
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after")]
    assert saved[0] == saved[1]


def test_loading_exchanges_unless_told_not_to() -> None:
    def kinds(fused: str) -> set[bool]:
        loaded = load(ModelConfig(fused=fused), DenseConfig(), torch.float32, "cpu")
        return {isinstance(module, FusedModule) for module in loaded.model.modules()}

    assert kinds("auto") == {True, False} and kinds("off") == {False}


def test_what_could_be_fused_shows_without_weights() -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**GROUPED))
    assert candidates(model) == "5 x norm, 2 x gated MLP, 2 x rotary attention"

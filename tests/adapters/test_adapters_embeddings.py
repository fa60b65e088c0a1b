"""LoRA on the token embedding: the arithmetic, PEFT both ways, scaled embeddings, ties."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from adapters_models import COMMON, DECODER, VOCABULARY, bits, dense_twin, frozen, ids, logits, pefts, randomize
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.adapters.attach import attach
from finetune.adapters.dora import DoRAConfig
from finetune.adapters.ia3 import IA3Config
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.lora_plus import LoRAPlusConfig
from finetune.errors import ConfigError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore")
BAR = 2e-5
NAMES = {
    "llama": "embed_tokens",
    "gpt2": "wte",
    "opt": "embed_tokens",
    "mixtral": "embed_tokens",
    "gemma": "embed_tokens",
}


def gemma(tied: bool | None = False) -> nn.Module:
    """A family whose embedding multiplies what it looks up by the root of the hidden size."""
    torch.manual_seed(0)
    config = transformers.GemmaConfig(**COMMON, **DECODER, head_dim=16, tie_word_embeddings=tied)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def untied(family: str, quant: str = "dense") -> nn.Module:
    return gemma() if family == "gemma" else frozen(family, quant, tied=False)


def adapted(family: str, quant: str = "dense", moved: bool = True, **settings: object):
    model = untied(family, quant)
    torch.manual_seed(3)
    targets = [NAMES[family], *settings.pop("more", [])]
    adapter = attach(model, LoRAConfig(**{"rank": 4, "alpha": 8.0, "targets": targets, **settings}))
    if moved:
        randomize(adapter)
    return model, adapter


@pytest.mark.parametrize("family", NAMES)
def test_starts_as_the_base_and_trains_alone(family: str) -> None:
    model, adapter = adapted(family, moved=False)
    assert torch.equal(bits(logits(model)), bits(logits(untied(family))))
    assert [name.rpartition(".")[2] for name in adapter.trainable()] == ["lora_embedding_A", "lora_embedding_B"]
    randomize(adapter)
    model(ids(), labels=ids()).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapter.trainable())
    a_RV = next(iter(adapter.trainable().values()))
    seen = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(
        0, ids()[:, :-1].flatten(), True
    )  # the last ones predict nothing
    assert torch.equal(a_RV.grad.abs().sum(0) > 0, seen)


@pytest.mark.parametrize("quant", ["dense", "nf4"])
@pytest.mark.parametrize("family", NAMES)
def test_merged_equals_unmerged(family: str, quant: str) -> None:
    model, adapter = adapted(family, quant)
    wanted = logits(model)
    (name, weight), *others = adapter.merged()
    assert not others
    with adapter.detached():
        before = logits(model)
        stored = dict(model.named_parameters())[name]
        assert (weight.shape, weight.dtype) == (stored.shape, torch.float32)
        delta = 2.0 * (adapter.trainable()[name.replace("weight", "lora_embedding_B")] @
                       adapter.trainable()[name.replace("weight", "lora_embedding_A")]).T  # fmt: skip
        assert torch.allclose(weight - stored, delta, atol=1e-6)
        stored.data.copy_(weight)
        assert (logits(model) - wanted).norm() <= 1e-5 * wanted.norm()
    assert (before - wanted).abs().max() > 1e-2


def test_gradients_are_those_of_float64() -> None:
    model, adapter = adapted("gemma")
    model(ids(), labels=ids()).loss.backward()
    reference = gemma().double()
    reference.load_state_dict({k.replace(".base.", "."): v for k, v in model.state_dict().items() if "lora_" not in k})
    a_RV, b_HR = (p.detach().double().requires_grad_() for p in adapter.trainable().values())
    table = reference.model.embed_tokens.weight.detach() + 2.0 * (b_HR @ a_RV).T
    loss = torch.func.functional_call(
        reference, {"model.embed_tokens.weight": table}, kwargs={"input_ids": ids(), "labels": ids()}
    ).loss
    wanted = torch.autograd.grad(loss, (a_RV, b_HR))
    for parameter, grad in zip(adapter.trainable().values(), wanted, strict=True):
        assert (parameter.grad - grad).norm() <= 1e-5 * grad.norm()


def test_a_scale_of_the_embedding_is_found_in_its_own_dtype() -> None:
    """In bf16 the root of 48 is rounded; merged and unmerged agree only where the low-rank part is scaled alike."""
    settings = DECODER | {"hidden_size": 48}
    config = transformers.GemmaConfig(**COMMON, **settings, head_dim=12, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    attach(model, LoRAConfig(rank=4, targets=["embed_tokens"]))
    module = model.model.embed_tokens
    assert module.factor(torch.float32) == pytest.approx(48**0.5, abs=1e-6)
    wide = attach(gemma().to(torch.bfloat16), LoRAConfig(rank=4, targets=["embed_tokens"]))
    assert wide.model.model.embed_tokens.factor(torch.bfloat16) == 8.0
    narrow = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()
    attach(narrow, LoRAConfig(rank=4, targets=["embed_tokens"]))
    assert narrow.model.embed_tokens.factor(torch.bfloat16) == float(torch.tensor(48**0.5).bfloat16())
    assert model.model.embed_tokens.weight is module.base.weight


class Normed(nn.Embedding):
    """More than a lookup times a number."""

    def forward(self, ids_B: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(ids_B), dim=-1)


def test_an_embedding_that_is_more_than_a_lookup_is_refused() -> None:
    model = frozen("llama", tied=False)
    normed = Normed(VOCABULARY, 64)
    model.set_input_embeddings(normed)
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=r"names model\.embed_tokens, which is more than a lookup times a number"):
        attach(model, LoRAConfig(rank=4, targets=["q_proj", "embed_tokens"]))
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_tied_weights_are_refused_by_both_names(family: str) -> None:
    model = gemma(tied=True) if family == "gemma" else frozen(family, tied=True)
    with pytest.raises(ConfigError, match=r"names \S+, whose weight is tied to lm_head: .*train_also=\[lm_head, ") as e:
        attach(model, LoRAConfig(rank=4, targets=[NAMES[family]]))
    assert "\n" not in str(e.value)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ConfigError, match="whose weight is tied to lm_head"):
        attach(empty, LoRAConfig(rank=4, targets=[NAMES[family]]))


def test_the_halves_of_a_pair_share_one_table() -> None:
    config = transformers.T5Config(
        **{**COMMON, "decoder_start_token_id": 0}, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(
        ConfigError, match=r"names encoder\.embed_tokens, whose weight is tied to .*shared.*leave it out"
    ):
        attach(model, LoRAConfig(rank=4, targets=["encoder.embed_tokens"]))


def test_only_a_name_means_the_embedding() -> None:
    for targets in ("all-linear", ["*"], ["model.*"]):
        adapter = attach(frozen("llama", tied=False), LoRAConfig(rank=4, targets=targets))
        assert not any("embed" in name for name in adapter.trainable())
    with pytest.raises(ConfigError, match=r"'wpe' matches no projection of the model; have .*wte.*did you mean 'wte'"):
        attach(frozen("gpt2", tied=False), LoRAConfig(rank=4, targets=["wpe"]))


@pytest.mark.parametrize("config", [DoRAConfig, IA3Config])
def test_methods_without_a_form_say_so(config: type) -> None:
    with pytest.raises(ConfigError, match=rf"names model\.embed_tokens, .*adapter={config().name} has no form"):
        attach(frozen("llama", tied=False), config(targets=["q_proj", "embed_tokens"]))


def test_rank_above_the_table_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"adapter\.rank is 65, but model\.embed_tokens is 64 x 96: expected at most 64"
    ):
        attach(frozen("llama", tied=False), LoRAConfig(rank=65, targets=["embed_tokens"]))


def test_lora_plus_leaves_the_embedding_at_the_plain_rate() -> None:
    adapter = attach(frozen("llama", tied=False), LoRAPlusConfig(rank=4, targets=["embed_tokens", "q_proj"]))
    assert not any("embedding" in name for name in adapter.learning_rate_scales())
    assert adapter.learning_rate_scales()


def test_an_encoder_for_classification(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    wanted = logits(model)
    adapter = attach(model, LoRAConfig(rank=4, targets=["query", "word_embeddings"]))
    assert torch.equal(bits(logits(model)), bits(wanted))
    assert any("word_embeddings.lora_embedding_A" in name for name in adapter.trainable())
    assert adapter.mergeable


def test_saved_and_loaded_gives_the_same_bits(tmp_path: Path) -> None:
    model, adapter = adapted("gemma", more=["q_proj"])
    adapter.save(tmp_path)
    other = gemma()
    attach(other, LoRAConfig(path=str(tmp_path)))
    assert torch.equal(bits(logits(other)), bits(logits(model)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file({**tensors, key: tensors[key][:2]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"lora_embedding_A is 2 x 96, expected 4 x 96 \(rank 2 in the file, 4 here\)"):
        adapter.load(tmp_path)


@pytest.mark.parametrize("more", [["q_proj"], ["v_proj", "lm_head"]])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
def test_stock_peft_gives_our_logits(family: str, more: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, adapter = adapted(family, more=more)
    adapter.save(tmp_path)
    twin = gemma() if family == "gemma" else dense_twin(family, tied=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(twin, str(tmp_path)).eval()
    mine = logits(model)
    assert (logits(theirs) - mine).abs().max() <= BAR
    assert (logits(theirs.merge_and_unload()) - mine).abs().max() <= BAR


THEIRS = {
    "llama": ("llama", False, {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 6}}),
    "llama-head": ("llama", False, {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    "regex": ("llama", False, {"target_modules": r".*(q_proj|embed_tokens)"}),
    "gpt2-tied": ("gpt2", True, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "llama-tied": ("llama", True, {"target_modules": ["q_proj", "embed_tokens"]}),
    "gemma": ("gemma", False, {"target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_pefts_adapters_load_here(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    family, tied, settings = THEIRS[case]
    twin = gemma() if family == "gemma" else dense_twin(family, tied=tied)
    theirs = pefts(twin, peft.LoraConfig(r=4, lora_alpha=8, **settings), tmp_path)
    model = gemma() if family == "gemma" else frozen(family, tied=tied)
    adapter = attach(model, LoRAConfig(path=str(tmp_path)))
    wanted = logits(theirs)
    assert (logits(model) - wanted).abs().max() <= BAR
    with adapter.disabled():
        assert (logits(model) - wanted).abs().max() > 0.01
    assert adapter.mergeable != tied
    if tied:
        assert "whose weight is tied to lm_head" in adapter.obstacle
        with pytest.raises(ConfigError, match=r"adapter=lora does not merge: .* is tied to lm_head"):
            next(adapter.merged())
    adapter.save(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(
        gemma() if family == "gemma" else dense_twin(family, tied=tied), str(tmp_path / "again")
    ).eval()
    assert (logits(again) - wanted).abs().max() <= BAR


def test_a_copy_of_another_base_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(
        dense_twin("llama", tied=False), peft.LoraConfig(target_modules=["embed_tokens"])
    ).save_pretrained(tmp_path)
    model = frozen("llama", tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 5] += 1e-3
    with pytest.raises(ModelError, match=r"brings base_model\S+embed_tokens\.base_layer\.weight .*other values"):
        attach(model, LoRAConfig(path=str(tmp_path)))

"""The head that is described gives the loss that the model itself gives."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.data.rows import Batch
from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.structure import inspect
from finetune.structure.head import describe_head
from finetune.training.objectives.sft import SFTConfig, build

TINY = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=101,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "gemma2": (transformers.Gemma2Config, {"final_logit_softcapping": 3.0}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.0625}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 7.0, "embedding_multiplier": 2.0}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "mixtral_aux": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.3},
    ),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2}),
}


def tiny(name: str) -> nn.Module:
    config_type, more = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_type(**{**TINY, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # logits large enough for a cap to matter
    return model


def padded_batch() -> Batch:
    ids = torch.randint(3, 101, (3, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2, 6:] = -100
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return Batch(ids, labels, torch.arange(9).expand(3, 9).clone(), mask)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_equal_the_models_own(name: str) -> None:
    model = tiny(name)
    batch = padded_batch()
    objective = build(SFTConfig(), model)
    assert objective.note is None
    loss, count = objective.loss_sum(batch)
    (loss / count).backward()
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    own = model(**batch.model_inputs(), labels=batch.labels_BS).loss
    own.backward()
    assert (loss / count).item() == pytest.approx(own.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp_min(1e-3)
            assert (ours[key] - parameter.grad).abs().max() <= 1e-5 * scale, key


def test_what_is_found() -> None:
    assert describe_head(tiny("gemma2")).softcap == 3.0
    assert describe_head(tiny("cohere")).scale == 0.0625
    assert describe_head(tiny("granite")).scale == 1 / 7.0
    assert describe_head(tiny("mixtral")).aux_coefficient == 0.0
    assert describe_head(tiny("mixtral_aux")).aux_coefficient == 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_found_in_16_bits_too(dtype: torch.dtype) -> None:
    head = describe_head(tiny("gemma2").to(dtype))
    assert head is not None and head.softcap == 3.0 and head.scale == 1.0


def test_describing_changes_nothing() -> None:
    model = tiny("gpt2").train()
    before = torch.get_rng_state()
    describe_head(model)
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in model.modules())


class Shifted(transformers.LlamaForCausalLM):
    """A model whose logits are no function we know of."""

    def forward(self, *args: object, **kwargs: object) -> object:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.roll(1, dims=-1)
        return outputs


def test_a_head_that_is_not_understood_gets_full_logits_and_a_line() -> None:
    torch.manual_seed(0)
    model = Shifted(transformers.LlamaConfig(**TINY)).eval()
    assert describe_head(model) is None
    objective = build(SFTConfig(), model)
    assert "full logits" in objective.note
    batch = padded_batch()
    loss, count = objective.loss_sum(batch)
    logits = model(**batch.model_inputs()).logits
    own = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels_BS[:, 1:].flatten())
    assert (loss / count).item() == pytest.approx(own.item(), rel=1e-5)


class Adapted(nn.Module):
    """Stands for a head that something wraps."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.delta = inner, nn.Parameter(torch.randn_like(inner.weight) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x @ self.delta.T


def test_a_wrapped_head_is_used_through_its_own_forward() -> None:
    model = tiny("gemma2")
    model.lm_head = Adapted(nn.Linear(32, 101, bias=True))
    batch = padded_batch()
    objective = build(SFTConfig(), model)
    assert objective.note is None
    loss, count = objective.loss_sum(batch)
    (loss / count).backward()
    ours = model.lm_head.delta.grad.clone()
    model.zero_grad()
    own = model(**batch.model_inputs(), labels=batch.labels_BS).loss
    own.backward()
    assert (loss / count).item() == pytest.approx(own.item(), rel=1e-5)
    torch.testing.assert_close(ours, model.lm_head.delta.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "cohere"])
@pytest.mark.parametrize("also", [[], ["lm_head"]], ids=["frozen head", "trained head"])
def test_with_a_real_adapter(name: str, also: list[str]) -> None:
    if also and name in ("llama_tied", "gemma2", "cohere"):
        also = ["lm_head", "embed_tokens"]  # tied: they train as one tensor
    model = tiny(name)
    adapter = attach(model, LoRAConfig(rank=2, train_also=also))
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    compare(model, dict(adapter.trainable()))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_quantized_head(name: str) -> None:
    model = tiny(name)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    freeze(model, NF4Config(head=True), inspect(model))
    assert type(model.lm_head) is not nn.Linear
    adapter = attach(model, LoRAConfig(rank=2))
    compare(model, dict(adapter.trainable()))


def compare(model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    batch = padded_batch()
    objective = build(SFTConfig(), model)
    assert objective.note is None
    loss, count = objective.loss_sum(batch)
    (loss / count).backward()
    ours = {key: parameter.grad.clone() for key, parameter in trained.items()}
    model.zero_grad()
    own = model(**batch.model_inputs(), labels=batch.labels_BS).loss
    own.backward()
    assert (loss / count).item() == pytest.approx(own.item(), rel=1e-5)
    for key, parameter in trained.items():
        scale = parameter.grad.abs().max().clamp_min(1e-3)
        assert (ours[key] - parameter.grad).abs().max() <= 1e-5 * scale, key

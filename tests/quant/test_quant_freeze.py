"""Swapping a whole model: the frozen one computes what a dense one with the decoded weights computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from finetune.errors import ConfigError
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight, QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.structure.inspect import inspect

SIZES = {"vocab_size": 64, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **HEADS, **changes}))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=3, num_experts_per_tok=2))


def qwen2_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    moe = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 32}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **HEADS, **moe, num_experts=4, num_experts_per_tok=2))


def gpt_oss() -> nn.Module:
    """Experts stored as [E, I, O], with biases beside them."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**SIZES, **HEADS, head_dim=10, num_local_experts=3, num_experts_per_tok=2)
    return GptOssForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=40, n_layer=2, n_head=4, **ids))


FAMILIES = [llama, mixtral, qwen2_moe, gpt_oss, gpt2]


def build(family: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = family().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def decoded_twin(dense: nn.Module, frozen: nn.Module) -> nn.Module:
    """The dense model with every projection's weight replaced by what the frozen one decodes."""
    for projection in inspect(dense).projections:
        parent, _, leaf = projection.name.rpartition(".")
        target = getattr(dense.get_submodule(parent), leaf)
        w = frozen.get_submodule(projection.name).dequantize(torch.float32)
        parameter = target if projection.kind == "experts" else target.weight
        parameter.data = w.T if projection.kind == "conv1d" else w
    return dense


@pytest.mark.parametrize("config", [NF4Config(), NF4Config(block_size=128, double_quant=False), DenseConfig()], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_a_frozen_model_computes_with_the_decoded_weights(family: Callable[[], nn.Module], config: QuantConfig) -> None:
    dense = build(family)
    frozen = copy.deepcopy(dense)
    structure = inspect(frozen)
    freeze(frozen, config, structure)
    assert inspect(frozen) == structure, "a frozen model is described as the dense one was"
    assert all(isinstance(frozen.get_submodule(p.name), FrozenWeight) for p in structure.projections)
    assert not any(p.requires_grad for p in frozen.parameters())
    twin = decoded_twin(dense, frozen)
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        found, expected = frozen(input_ids=ids).logits, twin(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_gradients_pass_through_a_frozen_model(family: Callable[[], nn.Module]) -> None:
    dense = build(family)
    frozen = copy.deepcopy(dense)
    freeze(frozen, NF4Config(), inspect(frozen))
    twin = decoded_twin(dense, frozen)
    embedded = torch.randn(2, 7, 40)

    def gradient(model: nn.Module) -> torch.Tensor:
        leaf = embedded.clone().requires_grad_()
        model(inputs_embeds=leaf).logits.float().square().mean().backward()
        assert leaf.grad is not None
        return leaf.grad

    with torch.no_grad():
        frozen(inputs_embeds=embedded)
    torch.testing.assert_close(gradient(frozen), gradient(twin), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_the_dense_choice_keeps_every_key_and_tensor(family: Callable[[], nn.Module]) -> None:
    dense = build(family)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    freeze(dense, DenseConfig(), inspect(dense))
    after = dense.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_experts_hold_most_of_a_mixture_and_are_frozen_too() -> None:
    model = build(mixtral)
    freeze(model, NF4Config(), inspect(model))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, FrozenWeight)}
    assert sum(issubclass(kind, FrozenExperts) for kind in kinds.values()) == 4
    assert sum(issubclass(kind, FrozenLinear) for kind in kinds.values()) == 8
    assert model.config._experts_implementation == "eager"


def test_freezing_twice_changes_nothing() -> None:
    model = build(llama)
    freeze(model, NF4Config(), inspect(model))
    modules = dict(model.named_modules())
    freeze(model, NF4Config(), inspect(model))
    assert all(module is modules[name] for name, module in model.named_modules())


def test_the_head_is_quantized_only_when_asked() -> None:
    model = build(llama)
    freeze(model, NF4Config(), inspect(model))
    assert type(model.lm_head) is nn.Linear
    model = build(llama)
    freeze(model, NF4Config(head=True), inspect(model))
    assert isinstance(model.lm_head, FrozenLinear)


def test_a_tied_head_cannot_be_quantized() -> None:
    model = build(lambda: llama(tie_word_embeddings=True))
    with pytest.raises(ConfigError, match=r"quant\.head is true.*lm_head shares its weight"):
        freeze(model, NF4Config(head=True), inspect(model))

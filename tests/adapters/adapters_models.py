"""Tiny models that differ where adapters care: grouped queries, Conv1D with ties, biases, stacked experts."""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch
import transformers
from torch import Tensor, nn

from finetune.adapters.attach import attach
from finetune.adapters.base import Adapter
from finetune.adapters.lora import LoRAConfig
from finetune.errors import ConfigError
from finetune.quant.dense import DenseConfig
from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.registry import Registry
from finetune.structure import inspect

torch.set_num_threads(1)
VOCABULARY = 96
FAMILIES = ("llama", "gpt2", "opt", "mixtral")
QUANTS = {"dense": DenseConfig, "nf4": NF4Config}

COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip


def make(family: str, **settings: object) -> nn.Module:
    """A dense model with random weights, the same ones every time."""
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(**COMMON, **DECODER, **settings)
    elif family == "gpt2":
        config = transformers.GPT2Config(**COMMON, n_embd=64, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0,
                                         embd_pdrop=0.0, attn_pdrop=0.0, **settings)  # fmt: skip
    elif family == "opt":
        config = transformers.OPTConfig(**COMMON, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96,
                                        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
                                        dropout=0.0, **settings)  # fmt: skip
    elif family == "gpt_oss":
        config = transformers.GptOssConfig(**COMMON, **DECODER, head_dim=16, num_local_experts=4,
                                           num_experts_per_tok=2, **settings)  # fmt: skip
    else:
        config = transformers.MixtralConfig(**COMMON, **DECODER, num_local_experts=4, num_experts_per_tok=2, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@functools.cache
def _frozen(family: str, quant: str, tied: bool | None) -> nn.Module:
    model = make(family, **({} if tied is None else {"tie_word_embeddings": tied}))
    # Widths drawn at 0.02 make logits of 0.1; larger ones make differences visible.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "gate.weight" not in name:
                parameter.mul_(4)
    freeze(model, QUANTS[quant](), inspect(model))
    return model


def frozen(family: str, quant: str = "dense", tied: bool | None = None) -> nn.Module:
    """A model whose projections are frozen in a storage format; a new copy each time."""
    return copy.deepcopy(_frozen(family, quant, tied))


def dense_twin(family: str, quant: str = "dense", tied: bool | None = None) -> nn.Module:
    """A stock transformers model that holds the weights that `frozen` decodes to."""
    stored = frozen(family, quant, tied)
    twin = make(family, **({} if tied is None else {"tie_word_embeddings": tied}))
    twin.set_experts_implementation("eager")
    weights = {n: p for n, p in stored.state_dict().items() if n in twin.state_dict() and p.is_floating_point()}
    for p in inspect(stored).projections:
        weight = stored.get_submodule(p.name).dequantize(torch.float32)
        key = p.name if p.kind == "experts" else f"{p.name}.weight"
        weights[key] = weight.T if p.kind == "conv1d" else weight
    twin.load_state_dict(weights)
    return twin.eval()


def config_for(registry: Registry, method: str, family: str, **settings: object):
    """A method's settings for a family: the first of those below that it does not refuse.

    A method may have no form for stacked experts, and nothing to train where there are no biases.
    """
    config_type = registry.type_of(method)
    known = {field.name for field in dataclasses.fields(config_type)}
    refusal: ConfigError | None = None
    for more in ({}, {"targets": ["self_attn.*"]}, {"bias": "all"}):
        if not more.keys() <= known:
            continue
        config = config_type(**settings, **more)
        try:
            attach(frozen(family), config)
        except ConfigError as error:
            refusal = refusal or error
        else:
            return config
    assert refusal is not None
    raise refusal


def randomize(adapter: Adapter, scale: float = 0.05) -> None:
    """Move every trainable tensor off its start, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def ids(rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(ids(), use_cache=False).logits


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits, so that 0.0 and -0.0 differ."""
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def lora(family: str = "llama", quant: str = "dense", tied: bool | None = None, **settings: object):
    """A frozen model with a LoRA that has moved off its start."""
    model = frozen(family, quant, tied)
    torch.manual_seed(3)
    adapter = attach(model, LoRAConfig(**{"rank": 4, "alpha": 8.0, **settings}))
    randomize(adapter)
    return model, adapter

"""Tiny models that differ where adapters care, and what every one of them is fed.

The contract runs over `FAMILIES`: grouped queries, Conv1D with ties, biases, stacked experts, an encoder with a task
head, an encoder and a decoder. `TINY` has many more; tables of families belong to tests, never to the product.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from finetune.adapters.attach import attach
from finetune.adapters.base import Adapter
from finetune.adapters.lora import LoRAConfig
from finetune.errors import ConfigError
from finetune.quant.affine import Int4Config, Int8gConfig
from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.fp4 import FP4Config
from finetune.quant.freeze import freeze
from finetune.quant.int8 import Int8Config
from finetune.quant.nf4 import NF4Config
from finetune.quant.w8a8 import W8A8Config
from finetune.registry import Registry
from finetune.structure import inspect

torch.set_num_threads(1)
VOCABULARY = 96
DECODERS = ("llama", "gpt2", "opt", "mixtral")
FAMILIES = (*DECODERS, "bert", "t5")
QUANTS: dict[str, Callable[[], QuantConfig]] = {
    "dense": DenseConfig, "nf4": NF4Config, "fp4": FP4Config,
    "int8": functools.partial(Int8Config, threshold=2.0),  # low, so that small models have outliers too
    "int8g": Int8gConfig,
    "int4": functools.partial(Int4Config, group_size=32),
    "w8a8": W8A8Config,
}  # fmt: skip

COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128}  # fmt: skip
DECODER = SIZES | {"num_key_value_heads": 2}
WIDE = COMMON | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
HEADS = DECODER | {"head_dim": 16}
OLD = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ENCODER = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
      "dropout_rate": 0.0, "decoder_start_token_id": 0}  # fmt: skip
BART = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128,
        "dropout": 0.0, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip

TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("CausalLM", "Llama", DECODER),
    "gpt2": ("CausalLM", "GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
                                  "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": ("CausalLM", "OPT", OLD | {"word_embed_proj_dim": 64, "ffn_dim": 96, "max_position_embeddings": 128,
                                      "dropout": 0.0}),
    "mixtral": ("CausalLM", "Mixtral", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "bert": ("SequenceClassification", "Bert", ENCODER),
    "t5": ("Seq2SeqLM", "T5", T5),
    "gpt_oss": ("CausalLM", "GptOss", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mistral": ("CausalLM", "Mistral", DECODER | {"sliding_window": 8}),
    "qwen2": ("CausalLM", "Qwen2", DECODER),
    "qwen3": ("CausalLM", "Qwen3", HEADS),
    "gemma": ("CausalLM", "Gemma", HEADS),
    "gemma2": ("CausalLM", "Gemma2", HEADS | {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("CausalLM", "Gemma3Text", HEADS | {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi": ("CausalLM", "Phi", SIZES),
    "phi3": ("CausalLM", "Phi3", DECODER),
    "glm": ("CausalLM", "Glm", HEADS),
    "glm4": ("CausalLM", "Glm4", HEADS),
    "falcon": ("CausalLM", "Falcon", OLD),
    "falcon_new": ("CausalLM", "Falcon", OLD | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("CausalLM", "Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("CausalLM", "GPTNeoX", SIZES),
    "qwen2_moe": ("CausalLM", "Qwen2Moe", DECODER | EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("CausalLM", "Qwen3Moe", HEADS | EXPERTS),
    "bert_mlm": ("MaskedLM", "Bert", ENCODER),
    "roberta": ("SequenceClassification", "Roberta", ENCODER),
    "roberta_mlm": ("MaskedLM", "Roberta", ENCODER),
    "llama_score": ("SequenceClassification", "Llama", DECODER | {"num_labels": 3}),
    "t5_gated": ("Seq2SeqLM", "T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("Seq2SeqLM", "Bart", BART),
}  # fmt: skip
"""Task, configuration and its settings."""


def make(family: str, **settings: object) -> nn.Module:
    """A dense model with random weights, the same ones every time."""
    task, name, own = TINY[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **own, **settings})
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config, attn_implementation="eager")
    return model.eval()


def task_of(model: nn.Module) -> str:
    """CausalLM | MaskedLM | SequenceClassification | Seq2SeqLM."""
    if model.config.is_encoder_decoder:
        return "Seq2SeqLM"
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    return next((task for task in ("SequenceClassification", "MaskedLM") if name.endswith(task)), "CausalLM")


@functools.cache
def _frozen(family: str, quant: str, tied: bool | None) -> nn.Module:
    model = make(family, **({} if tied is None else {"tie_word_embeddings": tied}))
    # Widths drawn at 0.02 make logits of 0.1; larger ones make differences visible.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "gate.weight" not in name and parameter.std() < 0.03:
                parameter.mul_(4)
    freeze(model, QUANTS[quant](), inspect(model))
    return model


def frozen(family: str, quant: str = "dense", tied: bool | None = None) -> nn.Module:
    """A model whose projections are frozen in a storage format; a new copy each time."""
    return copy.deepcopy(_frozen(family, quant, tied))


def frozen_or_plain(family: str, settings: dict[str, Any] | None) -> nn.Module:
    """One of ours; with settings, a plain causal language model of any family of transformers."""
    if settings is None:
        return frozen(family)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**settings)).eval()


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


SETTINGS: dict[str, dict[str, Any]] = {"layers": {"layers": [0]}}
"""What a method cannot do without, by method."""
BASES: dict[str, tuple[str, ...]] = {"qa_lora": ("int4",), "qat": ("dense", "int4"), "qat_scales": ("int4",)}
"""Storage formats that a method works on, where that is not every one."""
REFUSED: dict[tuple[str, str], str] = {}
"""What a family cannot carry, by method and family, and a part of the words that say so."""
CANNOT_PACK = ("bloom",)
"""Families whose attention tells rows apart neither by positions nor by a mask of queries and keys."""
SMALLER = {"prefix_length": 3}
"""Settings that make a method cheaper to try, where it has them."""
ALTERNATIVES: tuple[dict[str, Any], ...] = ({}, {"targets": ["self_attn.*"]}, {"bias": "all"})
"""A method may have no form for stacked experts, and nothing to train where there are no biases."""


def config_for(registry: Registry, method: str, family: str, **settings: object):
    """A method's settings for a family: the first alternative that it does not refuse."""
    config_type = registry.type_of(method)
    known = {field.name for field in dataclasses.fields(config_type)}
    smaller = {key: value for key, value in SMALLER.items() if key in known}
    return config_type(
        **{**smaller, **SETTINGS.get(method, {}), **_alternative(config_type, method, family), **settings}
    )


@functools.cache
def _alternative(config_type: type, method: str, family: str) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(config_type)}
    refusal: ConfigError | None = None
    for more in ALTERNATIVES:
        if more.keys() <= known:
            try:
                attach(
                    frozen(family, BASES.get(method, ("dense",))[0]),
                    config_type(**{**SETTINGS.get(method, {}), **more}),
                )
            except ConfigError as error:
                refusal = refusal or error
            else:
                return more
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


def inputs(model: nn.Module) -> dict[str, Any]:
    """What a model is fed, without labels."""
    task = task_of(model)
    fed: dict[str, Any] = {"input_ids": ids()}
    if task == "Seq2SeqLM":
        fed["decoder_input_ids"] = ids(length=7)
    return fed if task in ("MaskedLM", "SequenceClassification") else fed | {"use_cache": False}


def loss(model: nn.Module) -> Tensor:
    """The model's own loss on what it is fed."""
    kinds = {"Seq2SeqLM": ids(length=7).flip(1), "SequenceClassification": torch.tensor([0, 2])}
    return model(**inputs(model), labels=kinds.get(task_of(model), ids())).loss


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """[B, S, V], or [B, labels] of a classifier."""
    return model(**inputs(model)).logits


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits, so that 0.0 and -0.0 differ."""
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def pefts(model: nn.Module, config: Any, directory: Path, size: float = 0.05) -> nn.Module:
    """PEFT's own adapter on a dense model, moved off its start and saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = importlib.import_module("peft").get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    theirs.save_pretrained(directory)
    return theirs


def lora(family: str = "llama", quant: str = "dense", tied: bool | None = None, **settings: object):
    """A frozen model with a LoRA that has moved off its start."""
    model = frozen(family, quant, tied)
    torch.manual_seed(3)
    adapter = attach(model, LoRAConfig(**{"rank": 4, "alpha": 8.0, **settings}))
    randomize(adapter)
    return model, adapter

"""Tiny random models of families that hold feed-forwards and heads in different ways, and how the tests cut them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune.model.config import ModelConfig
from finetune.model.pretrained import empty_model, quiet
from finetune.quant.dense import DenseConfig
from finetune.quant.driver import Driver
from finetune.quant.pruners.base import PRUNERS, PrunerConfig
from finetune.quant.recipe import Recipe
from finetune.structure import inspect

VOCABULARY = 64
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PLAIN = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": {**LLAMA, "head_dim": 8},
    "Gemma": {**LLAMA, "head_dim": 8},
    "Gemma2": {**LLAMA, "head_dim": 8, "num_hidden_layers": 4},
    "Olmo2": LLAMA,
    "Phi3": {**LLAMA, "pad_token_id": 0},
    "Mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {**LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        **LLAMA,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "GPT2": GPT2,
    "OPT": {**{k: v for k, v in PLAIN.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoX": PLAIN,
    "Falcon": {key: value for key, value in PLAIN.items() if key != "intermediate_size"},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "DeepseekV3": {
        **LLAMA,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}
"""By the name that transformers' classes begin with, sizes in the family's own words."""


def build(config: Any) -> Any:
    """The model of a configuration, on the meta device."""
    return empty_model(config, ModelConfig(path="embedded"))


def config_of(family: str) -> Any:
    """A configuration of that family."""
    import transformers

    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    with quiet():
        return getattr(transformers, f"{family}Config")(**{"vocab_size": VOCABULARY, **ends, **FAMILIES[family]})


def model_of(family: str) -> Any:
    """A random model: matrices with a standard deviation of 0.2, everything else a little off its start."""
    import transformers

    torch.manual_seed(0)
    with quiet():
        config = config_of(family)
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
            else:
                parameter += torch.randn_like(parameter) * 0.05
    return model


def batches(rows: int = 8) -> list[dict[str, Any]]:
    """Calibration text."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (2, rows, 24), generator=draw)
    return [{"input_ids": part, "use_cache": False} for part in ids]


def cut(model: Any, settings: PrunerConfig) -> Any:
    """Cut a model in place; what cut it."""
    pruner = PRUNERS.build(settings)
    with quiet():
        pruner.plan(build(model.config), build)
        Driver(model, inspect(model), Recipe(DenseConfig(), cut=pruner), batches()).go()
        pruner.finish(model)
    return pruner


def stock_of(model: Any) -> Any:
    """Transformers' own model of the configuration that a cut model has, with its weights."""
    from finetune.export.merge import Stock, stored_weight

    stock = Stock.of(model)
    weights = {name: stored_weight(model, name, stock.projections.get(name)) for name in stock.names}
    with quiet():
        config = type(model.config).from_dict(model.config.to_dict())
        config._attn_implementation = "eager"
        found = type(model)(config).float().eval()
    wrong = found.load_state_dict(weights, strict=False)
    assert not wrong.unexpected_keys
    assert set(wrong.missing_keys) <= set(stock.tied) | {n for n in found.state_dict() if n not in stock.names}
    found.tie_weights()
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of two rows that nothing was calibrated on."""
    ids = torch.arange(3, 43).reshape(2, 20)
    return model(input_ids=ids, use_cache=False).logits.float()


def readers_of(model: Any, kind: str) -> list[Any]:
    """The projections that read channels, or heads, of a dense model."""
    from finetune.structure.widths import attention_outputs, feedforward_outputs

    names = feedforward_outputs(model) if kind == "channels" else attention_outputs(model)
    return [p for p in inspect(model).projections if p.name in names]


@torch.no_grad()
def silence(model: Any, readers: list[Any], units: int) -> None:
    """Have every other channel, or group of heads, say nothing: the columns that read it become zero.

    Args:
        units: how many a reader has; 0 for one a column.
    """
    for p in readers:
        weight = model.get_parameter(p.name if p.kind == "experts" else f"{p.name}.weight")
        by_input = weight.movedim(-2 if p.transposed else -1, -1)
        by_input.unflatten(-1, (units or p.in_features, -1))[..., ::2, :] = 0

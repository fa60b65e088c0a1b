"""Tiny models of many families with what transforms can scale in them, and runs that only transform."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from finetune.quant.affine import Int4Config
from finetune.quant.driver import Driver
from finetune.quant.recipe import Recipe
from finetune.quant.transforms.base import Transform
from finetune.structure import inspect
from finetune.structure.base import Projection

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


def transformed(model: Any, transform: Transform, quant: Any = None) -> Transform:
    Untouched(model, inspect(model), Recipe(quant or Int4Config(group_size=32), transform=transform), batches_of()).go()
    return transform


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

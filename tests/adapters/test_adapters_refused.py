"""What a family cannot carry is refused in words, and docs/methods.md lists it with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters_models import frozen

from finetune.adapters.attach import attach
from finetune.adapters.bitfit import BitFitConfig
from finetune.adapters.p_tuning_v2 import PTuningV2Config
from finetune.adapters.prefix import PrefixConfig
from finetune.errors import ConfigError

LISTED = Path(__file__).parents[2].joinpath("docs", "methods.md").read_text("utf-8").partition("## Refused, and why")[2]


def latent_attention() -> torch.nn.Module:
    """DeepSeek-V3: a key is a part with and a part without rotation, a value has a width of its own."""
    settings: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**settings)).eval()


@pytest.mark.parametrize(
    "config", [PrefixConfig(prefix_length=3), PTuningV2Config(prefix_length=3)], ids=lambda c: c.name
)
def test_keys_and_values_of_different_widths(config: PrefixConfig | PTuningV2Config) -> None:
    words = f"adapter={config.name} needs keys and values of one shape in all blocks, .* 4 heads of 16 and 12"
    with pytest.raises(ConfigError, match=words):
        attach(latent_attention(), config)
    assert "keys and values are of different widths (the multi-head latent attention of DeepSeek-V3)" in LISTED


def test_no_biases_to_train() -> None:
    with pytest.raises(ConfigError, match="adapter=bitfit: the model has no biases"):
        attach(frozen("llama"), BitFitConfig())
    assert "`bitfit` with `bias: existing` without biases" in LISTED


def test_a_prefix_that_peft_lets_slide_out_of_sight_is_told_of() -> None:
    note = "adapter=prefix: all tokens see the prefix; with PEFT it slides out of a window of 8"
    assert attach(frozen("mistral"), PrefixConfig(prefix_length=3)).note == note
    assert attach(frozen("llama"), PrefixConfig(prefix_length=3)).note == ""

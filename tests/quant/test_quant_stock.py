"""A whole frozen model written to disk, opened by stock transformers + bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.quant.base import QuantConfig
from finetune.quant.fp4 import FP4Config
from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.structure.inspect import inspect

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **IDS))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4, **dropout, **IDS))


@pytest.mark.parametrize("config", [NF4Config(), FP4Config(double_quant=False)], ids=lambda c: c.name)
@pytest.mark.parametrize("family", [llama, gpt2], ids=lambda f: f.__name__)
def test_stock_transformers_computes_the_same(
    family: Callable[[], nn.Module], config: QuantConfig, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    model = family().eval()
    freeze(model, config, inspect(model))
    described = model.config.to_dict() | {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.name,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype="float32",
        ).to_dict()
    }
    (tmp_path / "config.json").write_text(json.dumps(described | {"architectures": [type(model).__name__]}))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # In training mode: in evaluation mode its CPU kernel rounds absmax to bf16.
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    assert sum(type(module).__name__ == "Linear4bit" for module in stock.modules()) == len(inspect(model).projections)
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)

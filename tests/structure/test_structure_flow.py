"""What projections are for, found by following activations through eighteen families, none of which the code knows."""

from __future__ import annotations

import pytest
import torch
import transformers

from finetune.structure.flow import trace

WIDE = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = WIDE | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
SEPARATE = ("k_proj v_proj", "o_proj", "down_proj")

CASES = {
    "Llama": (GROUPED, SEPARATE),
    "Mistral": (GROUPED, SEPARATE),
    "Qwen3": (GROUPED | {"head_dim": 16}, SEPARATE),
    "Gemma2": (GROUPED | {"head_dim": 16}, SEPARATE),
    "Cohere": (GROUPED, SEPARATE),
    "Glm": (GROUPED | {"head_dim": 16}, SEPARATE),
    "Phi": (SMALL, ("k_proj v_proj", "dense", "fc2")),
    "Phi3": (GROUPED, ("qkv_proj", "o_proj", "down_proj")),
    "GPTNeoX": (SMALL, ("query_key_value", "dense", "dense_4h_to_h")),
    "Falcon": (WIDE | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
               ("query_key_value", "dense", "dense_4h_to_h")),
    "Bloom": (WIDE | {"hidden_size": 64, "n_layer": 2, "n_head": 4}, ("query_key_value", "dense", "dense_4h_to_h")),
    "GPT2": (WIDE | {"n_embd": 64, "n_layer": 2, "n_head": 4}, ("c_attn", "attn.c_proj", "mlp.c_proj")),
    "GPTJ": (WIDE | {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
             ("k_proj v_proj", "out_proj", "fc_out")),
    "OPT": (WIDE | {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "max_position_embeddings": 128}, ("k_proj v_proj", "out_proj", "fc2")),
    "Mixtral": (EXPERTS, ("k_proj v_proj", "o_proj", "experts.down_proj")),
    "GptOss": (EXPERTS | {"head_dim": 16}, ("k_proj v_proj", "o_proj", "experts.down_proj")),
    "Qwen2Moe": (GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                            "shared_expert_intermediate_size": 48},
                 ("k_proj v_proj", "o_proj", "experts.down_proj shared_expert.down_proj")),
}  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_finds_attention_and_feedforward(family: str) -> None:
    settings, expected = CASES[family]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**settings))
    flow = trace(model)
    assert flow is not None
    for found, leaves in zip((flow.key_value, flow.attention_output, flow.feedforward_output), expected, strict=True):
        assert len(found) == 2 * len(leaves.split()), found
        assert all(name.endswith(tuple(f".{leaf}" for leaf in leaves.split())) for name in found), found


PAIR = WIDE | {"d_model": 64, "decoder_start_token_id": 0}
T5 = PAIR | {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
BART = PAIR | {f"{half}_{key}": value for half in ("encoder", "decoder")
               for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 96}.items()}  # fmt: skip
OTHERS = {
    "Bert": (SMALL, "SequenceClassification", ("self.key self.value", "attention.output.dense", "output.dense")),
    "Roberta": (SMALL, "MaskedLM", ("self.key self.value", "attention.output.dense", "output.dense")),
    "DistilBert": (WIDE | {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}, "SequenceClassification",
                   ("k_lin v_lin", "out_lin", "lin2")),
    "DebertaV2": (SMALL, "SequenceClassification",
                  ("key_proj value_proj", "attention.output.dense", "output.dense")),
    "T5": (T5, "Seq2SeqLM", ("k v", "o", "wo")),
    "MT5": (T5 | {"feed_forward_proj": "gated-gelu"}, "Seq2SeqLM", ("k v", "o", "wo")),
    "LongT5": (T5, "Seq2SeqLM", ("k v", "o", "wo")),
    "Bart": (BART, "Seq2SeqLM", ("k_proj v_proj", "out_proj", "fc2")),
    "Pegasus": (BART, "Seq2SeqLM", ("k_proj v_proj", "out_proj", "fc2")),
    "Llama": (GROUPED, "SequenceClassification", SEPARATE),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_encoders_and_pairs(family: str) -> None:
    """A decoder that reads has two attentions and one feed-forward a block."""
    settings, task, expected = OTHERS[family]
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    flow = trace(model)
    assert flow is not None
    attentions, feedforwards = (6, 4) if task == "Seq2SeqLM" else (2, 2)
    found = (flow.key_value, flow.attention_output, flow.feedforward_output)
    for names, leaves, count in zip(found, expected, (attentions, attentions, feedforwards), strict=True):
        assert len(names) == count * len(leaves.split()), names
        assert all(name.endswith(tuple(f".{leaf}" for leaf in leaves.split())) for name in names), names
    assert not {name for name in flow.feedforward_output if "ttention" in name}


QUERY_KEY_VALUE = {
    "Llama": (GROUPED, "CausalLM", "q_proj k_proj v_proj"),
    "Gemma3Text": (GROUPED | {"head_dim": 16}, "CausalLM", "q_proj k_proj v_proj"),
    "Qwen3Moe": (GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
                 "CausalLM", "q_proj k_proj v_proj"),
    "Bloom": (*CASES["Bloom"][:1], "CausalLM", "query_key_value query_key_value query_key_value"),
    "GPTJ": (*CASES["GPTJ"][:1], "CausalLM", "q_proj k_proj v_proj"),
    "Bert": (SMALL, "SequenceClassification", "query key value"),
    "T5": (T5, "Seq2SeqLM", "q k v"),
    "LongT5": (T5, "Seq2SeqLM", "q k v"),
}  # fmt: skip


@pytest.mark.parametrize("family", QUERY_KEY_VALUE)
def test_queries_keys_and_values_are_told_apart(family: str) -> None:
    settings, task, expected = QUERY_KEY_VALUE[family]
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.device("meta"):
        flow = trace(getattr(transformers, f"AutoModelFor{task}").from_config(config))
    assert flow is not None
    for names, leaf in zip((flow.query, flow.key, flow.value), expected.split(), strict=True):
        assert {name.rpartition(".")[2] for name in names} == {leaf}
        assert len(names) == (6 if task == "Seq2SeqLM" else 2)
    assert {*flow.key_value} == {*flow.key, *flow.value}


def test_latent_attention_and_mixed_blocks() -> None:
    settings = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1}  # fmt: skip
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SMALL | settings))
    flow = trace(model)
    assert flow is not None
    assert {name.rpartition(".")[2] for name in flow.key_value} == {"kv_a_proj_with_mqa", "kv_b_proj"}
    assert [name.split(".", 3)[3] for name in flow.feedforward_output] == [
        "mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_experts.down_proj"
    ]  # fmt: skip


def test_a_model_without_attention_is_not_understood() -> None:
    with torch.device("meta"):
        config = transformers.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8)
        model = transformers.MambaForCausalLM(config)
    assert trace(model) is None


def test_outputs_that_a_model_writes_into() -> None:
    """Falcon adds the output of attention to that of its feed-forward in place, where it runs both side by side."""
    config = transformers.FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    falcon = trace(transformers.FalconForCausalLM(config))
    assert falcon is not None and falcon.overwritten
    assert set(falcon.overwritten) <= {*falcon.feedforward_output, *falcon.attention_output}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    llama = trace(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)))
    assert llama is not None and llama.overwritten == ()

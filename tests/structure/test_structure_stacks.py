"""Stacks, where tokens come in, and heads made for a task, in families of every shape."""

import pytest
import torch
import transformers
from transformers import AutoConfig

from finetune.structure import Stack, inspect

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
DECODERS = {"llama": "model", "falcon": "transformer", "bloom": "transformer", "opt": "model.decoder",
            "gpt2": "transformer", "gpt_neox": "gpt_neox", "mixtral": "model"}  # fmt: skip


def empty(kind: str, task: str, **settings):
    config = AutoConfig.for_model(kind, **settings)
    with torch.device("meta"):
        return getattr(transformers, f"AutoModelFor{task}").from_config(config)


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_is_one_causal_stack(family):
    settings = SMALL if family in ("llama", "falcon", "opt", "gpt_neox", "mixtral") else {"n_layer": 2}
    structure = inspect(empty(family, "CausalLM", **settings))
    assert structure.stacks == (Stack(DECODERS[family], structure.blocks, True, embeddings=structure.embeddings),)
    assert structure.task_head == ()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_an_encoder_is_one_stack_that_looks_both_ways(family):
    structure = inspect(empty(family, "SequenceClassification"))
    (stack,) = structure.stacks
    assert (stack.name, stack.causal, stack.blocks) == (family, False, structure.blocks)
    assert "classifier" in structure.task_head and structure.head is None


@pytest.mark.parametrize(
    ("family", "names"), [("t5", ("encoder", "decoder")), ("bart", ("model.encoder", "model.decoder"))]
)
def test_a_pair_is_two_stacks_of_which_the_second_reads(family, names):
    structure = inspect(empty(family, "Seq2SeqLM"))
    assert tuple(stack.name for stack in structure.stacks) == names
    assert [(stack.causal, stack.reads) for stack in structure.stacks] == [(False, False), (True, True)]
    assert structure.blocks == structure.stacks[0].blocks + structure.stacks[1].blocks
    assert {p.block for p in structure.projections} == set(range(len(structure.blocks)))


@pytest.mark.parametrize(("family", "prefix"), [("t5", ""), ("bart", "model."), ("mt5", "")])
def test_each_half_of_a_pair_has_an_embedding_of_its_own_and_all_share_one_weight(family, prefix):
    structure = inspect(empty(family, "Seq2SeqLM"))
    halves = tuple(f"{prefix}{half}.embed_tokens" for half in ("encoder", "decoder"))
    assert tuple(stack.embeddings for stack in structure.stacks) == halves
    assert structure.embeddings == halves[0] and structure.tied
    assert structure.ties == (f"{prefix}shared", *halves, "lm_head")
    settings = {"d_model": 32, "num_layers": 1, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50}
    if family != "bart":
        settings |= {"d_kv": 8, "d_ff": 32, "num_heads": 2, "num_decoder_layers": 1}
    config = AutoConfig.for_model(family, **settings)
    assert inspect(transformers.AutoModelForSeq2SeqLM.from_config(config)).ties == structure.ties


def test_what_is_not_tied_shares_nothing():
    assert inspect(empty("llama", "CausalLM", **SMALL)).ties == ()
    tied = inspect(empty("llama", "CausalLM", **SMALL, tie_word_embeddings=True))
    assert tied.ties == ("model.embed_tokens", "lm_head") and tied.tied


def test_attention_that_does_not_say_is_causal_where_it_can_take_a_cache():
    assert not inspect(empty("deberta-v2", "SequenceClassification", **SMALL)).stacks[0].causal


def test_weights_that_the_model_wants_in_floating_point_are_known():
    dense = {p.leaf for p in inspect(empty("t5", "Seq2SeqLM")).projections if p.dense}
    assert dense == {"wo"}
    assert not any(p.dense for p in inspect(empty("bart", "Seq2SeqLM")).projections)


def test_the_score_of_a_decoder_is_its_task_head():
    structure = inspect(empty("llama", "SequenceClassification", **SMALL))
    assert structure.task_head == ("score",) and structure.stacks[0].causal

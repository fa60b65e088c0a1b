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
    assert structure.stacks == (Stack(DECODERS[family], structure.blocks, causal=True),)
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


def test_the_score_of_a_decoder_is_its_task_head():
    structure = inspect(empty("llama", "SequenceClassification", **SMALL))
    assert structure.task_head == ("score",) and structure.stacks[0].causal

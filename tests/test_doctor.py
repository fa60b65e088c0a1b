"""What `finetune doctor` says of a model and an adapter, on five families that differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from finetune.adapters.base import ADAPTERS
from finetune.config import RunConfig
from finetune.doctor import describe
from finetune.errors import ModelError
from finetune.model.config import ModelConfig
from finetune.quant.base import QUANTIZERS

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4),
    "moe": transformers.Qwen2MoeConfig(**SMALL, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
                                       moe_intermediate_size=32, shared_expert_intermediate_size=48,
                                       mlp_only_layers=[0]),
    "bert": transformers.BertConfig(**SMALL),
    "t5": transformers.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=96),
}  # fmt: skip

SAYS = {
    ("llama", "lora", "nf4"): """
        takes tokens in: model by model.embed_tokens; each position sees what precedes it
        head: lm_head: quant.head and adapter.targets leave it alone unless they name it
        blocks: 3 alike, model.layers.0 to model.layers.2 (* adapter=lora)
        * self_attn.q_proj: linear 64 -> 64, query
        * self_attn.k_proj: linear 64 -> 32, key
        * self_attn.v_proj: linear 64 -> 32, value
        * self_attn.o_proj: linear 64 -> 64, attention output
        * mlp.gate_proj: linear 64 -> 96, feed-forward input
        * mlp.down_proj: linear 96 -> 64, feed-forward output
        bottlenecks go after: self_attn.o_proj, mlp.down_proj of every block that has them
        virtual tokens go in: before the tokens of model
        trained keys and values go in: self_attn of every block of model
        self_attn.q_proj.lora_A.weight [16, 64], 3 times
        it merges into plain weights""",
    ("gpt2", "ia3", "none"): """
        quant=none: everything stays in 16 or 32 bits
        one weight: transformer.wte, lm_head: adapter.train_also names all of them or none
        * attn.c_attn: conv1d 64 -> 192, queries, keys and values
        attn.c_proj: conv1d 64 -> 64, attention output
        * mlp.c_proj: conv1d 256 -> 64, feed-forward output
        adapter=ia3 trains 1,344 weights""",
    ("moe", "dora", "int4"): """
        blocks: model.layers.0
        blocks: 2 alike, model.layers.1 to model.layers.2
        mlp.experts.gate_up_proj: experts 64 -> 64 x 4 experts, feed-forward input
        mlp.experts.down_proj: experts 32 -> 64 x 4 experts, feed-forward output
        mlp.gate: left alone: it chooses or weighs experts, and an error in it sends a token elsewhere
        mlp.shared_expert_gate: left alone: it chooses or weighs experts, and an error in it sends a token elsewhere
        bottlenecks go after: self_attn.o_proj, mlp.down_proj, mlp of every block that has them
        adapter=dora refuses: adapter=dora cannot adapt stacked experts such as""",
    ("bert", "houlsby", "int8"): """
        as a sequence classifier, 3 blocks, 18 projections
        takes tokens in: bert by bert.embeddings.word_embeddings; each position sees all
        head made for the task: classifier: trains beside every adapter
        attention.self.query: linear 64 -> 64, query
        * attention.output.dense: linear 64 -> 64, attention output
        * output.dense: linear 96 -> 64, feed-forward output
        classifier.trained.weight [2, 64]
        it does not merge: what follows a sub-layer through an activation is no weight of it""",
    ("t5", "prompt_tuning", "nf4"): """
        as a sequence-to-sequence model, 4 blocks
        takes tokens in: encoder by encoder.embed_tokens; each position sees all
        decoder by decoder.embed_tokens; each position sees what precedes it, and all of the stack before
        one weight: shared, encoder.embed_tokens, decoder.embed_tokens, lm_head: adapter.train_also names all of them
        blocks: 2 alike, encoder.block.0 to encoder.block.1
        blocks: 2 alike, decoder.block.0 to decoder.block.1
        layer.1.EncDecAttention.k: linear 64 -> 64, key
        layer.2.DenseReluDense.wo: linear 96 -> 64, feed-forward output; stays in floating point, which the model's
        virtual tokens go in: before the tokens of encoder
        trained keys and values go in: the cache of decoder
        it takes up 100 positions of the context before every row""",
}


def configured(directory: Path, adapter: str, quant: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(directory)),
        adapter=ADAPTERS.type_of(adapter)(),
        quant=QUANTIZERS.type_of(quant)(),
    )


@pytest.fixture
def said(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The report on a checkpoint of which only the header is there: no weights are read."""
    from safetensors.torch import save_file

    family, adapter, quant = request.param
    CONFIGS[family].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors")
    return describe(configured(tmp_path, adapter, quant))


@pytest.mark.parametrize(("said", "words"), SAYS.items(), indirect=["said"], ids=["-".join(key) for key in SAYS])
def test_says_what_would_be_adapted_and_why(said: list[str], words: str) -> None:
    text = "\n".join(said)
    for line in words.strip().splitlines():
        assert line.strip() in text, f"{line.strip()!r} is not in\n{text}"
    assert not any("\n" in line for line in said)


@pytest.mark.parametrize("said", [("llama", "qa_lora", "nf4")], indirect=True)
def test_a_storage_that_the_method_does_not_take_is_told(said: list[str]) -> None:
    assert any(
        line.startswith("adapter=qa_lora refuses: adapter=qa_lora needs a base stored in groups") for line in said
    )
    assert not any(line.startswith("  *") for line in said)


def test_a_model_that_serves_no_task_is_one_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    transformers.CLIPConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as raised:
        describe(configured(tmp_path, "lora", "nf4"))
    assert "\n" not in str(raised.value)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in str(raised.value)

"""How blocks are called, seen without running them: the truth where stacks are plain, and no answer where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, T5Config, T5ForConditionalGeneration

from finetune.quant.replay import record
from finetune.quant.standins import answer_of, ending, rehearse
from finetune.structure import inspect

BLOCKS = ("blocks.0", "blocks.1")


class Block(nn.Module):
    kind = "full"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor) -> Any:
        return self.linear(x) + shift


class TupleBlock(Block):
    def forward(self, x: Tensor, shift: Tensor) -> Any:
        return (super().forward(x, shift),)


class Model(nn.Module):
    """A stack that is plain, or is not, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        kind = TupleBlock if way == "tuple" else Block
        self.embed, self.blocks, self.head = nn.Embedding(8, 4), nn.ModuleList([kind(), kind()]), nn.Linear(4, 8)

    def forward(self, input_ids: Tensor) -> Any:
        first = x = self.embed(input_ids)
        shift = torch.ones(4)
        for block in self.blocks:
            assert block.kind == "full"  # asked of the block itself
            if self.way == "argument":
                shift = shift + x.mean()
            x = block(x + first if self.way == "shortcut" else x, shift)
            x = x[0] if self.way == "tuple" else x
        return (self.head(x),)


@pytest.mark.parametrize(
    ("way", "plain"), [("tensor", True), ("tuple", True), ("argument", False), ("shortcut", False)]
)
def test_whether_a_stack_is_plain_is_found_out(way: str, plain: bool) -> None:
    model, batch = Model(way), {"input_ids": torch.arange(6).reshape(2, 3)}
    model.blocks.to("meta")
    answer = answer_of(model, BLOCKS, batch)
    assert (answer is not None) is plain
    assert [type(block) for block in model.blocks] == [TupleBlock if way == "tuple" else Block] * 2


def tiny(kind: type, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(kind(**sizes, **changes)).eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LlamaConfig, {"intermediate_size": 24, "num_key_value_heads": 1}),
        (OPTConfig, {"ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 32}),
    ],
)
def test_a_rehearsal_sees_what_a_run_sees(kind: type, changes: dict[str, Any]) -> None:
    model = tiny(kind, **changes)
    batches = [{"input_ids": torch.randint(0, 32, (2, length)), "use_cache": False} for length in (7, 5)]
    blocks = inspect(model).stacks[0].blocks
    truth = record(model, blocks, batches)
    with torch.no_grad():
        logits = [model(**batch).logits for batch in batches]
        first = last = list(truth.hidden)
        for number, block in enumerate(blocks):
            truth.hidden = last
            last = list(truth.forward(number, model.get_submodule(block))())
    model.get_submodule(blocks[0].rpartition(".")[0]).to("meta")
    answer = answer_of(model, blocks, batches[0])
    assert answer is not None
    seen = rehearse(model, blocks, batches, answer, [])
    for ours, theirs in zip(seen.hidden, first, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(seen.arguments, truth.arguments, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    with ending(model, blocks, answer) as give, torch.no_grad():
        for batch, hidden, expected in zip(batches, last, logits, strict=True):
            give(hidden)
            assert torch.equal(model(**batch).logits, expected)


def test_an_encoder_and_decoder_are_no_single_plain_stack() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(0, 32, (2, 5))
    batch = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    assert answer_of(model, inspect(model).blocks, batch) is None

"""A packed batch gives each row the logits it has alone: on real architectures, sdpa and eager."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.batching import collate, packed_mask
from finetune.data.rows import IGNORE, Row, TokenRows

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}


def config_of(family: str) -> Any:
    import transformers as hf

    return {
        "llama": lambda: hf.LlamaConfig(**GROUPED),
        "qwen2": lambda: hf.Qwen2Config(**GROUPED),
        "mistral_sliding": lambda: hf.MistralConfig(**GROUPED, sliding_window=5),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=64),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_positions=64, bos_token_id=0, eos_token_id=0
        ),
    }[family]()


FAMILIES = ["llama", "qwen2", "mistral_sliding", "gpt_neox", "gpt2"]


def model_of(config: Any, attention: str) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def rows_of(lengths: list[int]) -> TokenRows:
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = generator.integers(1, 64, length).astype(np.int32)
        labels = ids.copy()
        labels[: max(1, length // 2)] = IGNORE
        rows.append(Row(ids, labels))
    return TokenRows.of(rows)


ROWS = rows_of([7, 1, 12, 5, 9, 3])
PACKED = [[2, 0, 1], [4, 3], [5]]


def alone(model: Any, index: int) -> torch.Tensor:
    with torch.no_grad():
        return model(**collate(ROWS, [[index]], 0).model_inputs()).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_those_of_each_row_alone(family: str, attention: str) -> None:
    model = model_of(config_of(family), attention)
    with torch.no_grad():
        logits = model(**collate(ROWS, PACKED, pad_id=0).model_inputs()).logits
    for b, sequence in enumerate(PACKED):
        place = 0
        for index in sequence:
            length = len(ROWS[index].input_ids)
            torch.testing.assert_close(logits[b, place : place + length], alone(model, index), atol=1e-5, rtol=1e-5)
            place += length


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_logits_equal_those_of_each_row_alone(family: str) -> None:
    model = model_of(config_of(family), "sdpa")
    with torch.no_grad():
        logits = model(**collate(ROWS, [[i] for i in range(len(ROWS))], pad_id=0).model_inputs()).logits
    for index in range(len(ROWS)):
        length = len(ROWS[index].input_ids)
        torch.testing.assert_close(logits[index, :length], alone(model, index), atol=1e-5, rtol=1e-5)


def test_a_mask_of_ones_would_leak_so_the_comparison_can_fail() -> None:
    model = model_of(config_of("llama"), "sdpa")
    batch = collate(ROWS, [[2, 0]], pad_id=0)
    with torch.no_grad():
        joined = model(**batch.model_inputs(), attention_mask=torch.ones_like(batch.input_ids_BS)).logits[0, 12:]
    assert (joined - alone(model, 0)).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_explicit_mask_keeps_rows_apart_where_positions_do_not(attention: str) -> None:
    import transformers as hf

    config = hf.OPTConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    model = model_of(config, attention)
    batch = collate(ROWS, PACKED, pad_id=0)
    with torch.no_grad():
        logits = model(**batch.model_inputs(), attention_mask=packed_mask(batch, torch.float32)).logits
    torch.testing.assert_close(logits[0, 12:19], alone(model, 0), atol=1e-5, rtol=1e-5)


def test_packed_and_separate_rows_have_the_same_targets() -> None:
    from finetune.data.rows import Batch

    def targets(batch: Batch) -> list[int]:
        shifted = batch.shifted_labels_BS()
        return sorted(shifted[shifted != IGNORE].tolist())

    packed, separate = collate(ROWS, PACKED, 0), collate(ROWS, [[i] for i in range(len(ROWS))], 0)
    assert targets(packed) == targets(separate)
    assert packed.target_tokens() == separate.target_tokens() == int((ROWS.labels != IGNORE).sum())

"""Tiny checkpoints, rows they can learn, and a few steps on them, so that exports have something to keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.adapters.base import Adapter
from finetune.data.batching import eval_batches
from finetune.data.rows import IGNORE, Row, TokenRows
from finetune.export.base import ExportSource

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe") for b in ("ra", "se", "ti", "vo", "zu")]


@dataclass
class Trained:
    """A source ready to export and the rows to prove it on."""

    source: ExportSource
    rows: TokenRows
    adapter: Adapter


def write_base(directory: Path, config: Any) -> Path:
    """A random checkpoint with a word-level tokenizer, a chat template and stop tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "user", "assistant", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id = len(vocabulary), 1, 0, None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [1, 3], 0
    model.generation_config.bos_token_id = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def llama(**changes: Any) -> Any:
    """Two layers of width 64, which bitsandbytes' own block kernels handle exactly."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**sizes | changes)


def rows_to_learn(count: int, seed: int = 0) -> TokenRows:
    """Each word is followed by the word three further on in the vocabulary; the first two tokens are a prompt."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(generator.integers(5, 12))
        ids = (5 + (generator.integers(0, 25) + 3 * np.arange(length)) % 25).astype(np.int32)
        labels = ids.copy()
        labels[:2] = IGNORE
        rows.append(Row(ids, labels))
    return TokenRows.of(rows)


def fit(model: Any, adapter: Adapter, rows: TokenRows, steps: int) -> None:
    """A few full-batch steps, in training mode and then an evaluation forward, as a run would leave the model."""
    optimizer = torch.optim.Adam(adapter.trainable().values(), lr=1e-2)
    model.train()
    for _ in range(steps):
        for batch in eval_batches(rows, 64, 0):
            logits = model(**batch.model_inputs()).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.shifted_labels_BS().flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 8, 11]]))

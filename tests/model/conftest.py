"""Tiny random checkpoints on disk, of several families, with a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

torch.set_num_threads(1)

WIDTHS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 128,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 32},
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family of transformers; its weights are those of its own initialization, seed 0."""
    settings = GPT2 if family == "GPT2" else WIDTHS | EXTRA.get(family, {})
    config = getattr(transformers, f"{family}Config")(**settings | changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of 128 one-word tokens, without a pad token."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A directory with a tiny checkpoint, made once a session for each choice: not to be changed."""
    made: dict[Any, Path] = {}

    def make(family: str = "Llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
        key = (family, dtype, shard, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            tiny_model(family, dtype, **changes).save_pretrained(made[key], max_shard_size=shard)
            save_tokenizer(made[key])
        return made[key]

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows of eleven tokens."""
    return torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(1))

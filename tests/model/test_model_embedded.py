"""The base that ships inside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import finetune.assets
from finetune.model.config import ModelConfig
from finetune.model.describe import storage_table
from finetune.model.load import context_length, load, resolve
from finetune.quant.dense import DenseConfig
from finetune.quant.int8 import Int8Linear
from finetune.quant.int8_storage import Int8Config
from finetune.quant.nf4 import NF4Config

TINY = Path(finetune.assets.__file__).parent / "tiny"
pytestmark = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="the embedded base is not there yet")


def test_the_embedded_base_loads_by_name() -> None:
    loaded = load(ModelConfig(), NF4Config(), torch.bfloat16, "cpu")
    assert resolve(ModelConfig()) == loaded.base_path == str(TINY)
    assert loaded.notes == []
    blocks = [row for row in storage_table(loaded.model) if row.block]
    assert sum(row.weights for row in blocks if not row.dense) / sum(row.weights for row in blocks) > 0.99
    assert context_length(ModelConfig()) >= 256
    assert loaded.tokenizer.chat_template


def test_no_column_of_its_weights_is_lost_by_int8() -> None:
    """docs/quantization.md says so: nothing is kept beside the codes, which are bitsandbytes' own file."""
    model = load(ModelConfig(), Int8Config(), torch.bfloat16, "cpu").model
    stored = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert stored and all(module.columns is None for module in stored)


@torch.no_grad()
def test_its_hidden_states_are_tens_of_times_as_large_as_its_embeddings() -> None:
    """Why virtual tokens start large (docs/methods.md)."""
    loaded = load(ModelConfig(), DenseConfig(), torch.float32, "cpu")
    ids = loaded.tokenizer("def open(file, mode): Open a file and return a stream.", return_tensors="pt").input_ids
    embeddings, *states = loaded.model(ids, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    size = embeddings.square().mean().sqrt()
    assert all(state.square().mean().sqrt() > 20 * size for state in states)

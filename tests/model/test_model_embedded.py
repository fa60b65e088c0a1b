"""The base that ships inside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import finetune.assets
from finetune.model.config import ModelConfig
from finetune.model.describe import storage_table
from finetune.model.load import context_length, load, resolve
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

"""A tiny model on disk, frozen, adapted and trained a little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from export_tiny import Trained, fit, rows_to_learn, write_base

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.export.base import ExportSource
from finetune.model.config import ModelConfig
from finetune.model.load import load
from finetune.quant.base import QuantConfig


@pytest.fixture(scope="session")
def make_trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Build, load, adapt and train a model of a given architecture and storage."""
    torch.set_num_threads(1)

    def make(config: Any, quant: QuantConfig, *, steps: int = 12, dtype: str = "float32", **lora: Any) -> Trained:
        base = write_base(tmp_path_factory.mktemp("base"), config)
        loaded = load(ModelConfig(path=str(base)), quant, getattr(torch, dtype), "cpu")
        torch.manual_seed(1)
        adapter = attach(loaded.model, LoRAConfig(**{"rank": 8, "alpha": 16.0} | lora))
        fit(loaded.model, adapter, rows_to_learn(128), steps)
        source = ExportSource(
            model=loaded.model,
            adapter=adapter,
            tokenizer=loaded.tokenizer,
            base_path=str(base),
            dtype=torch.bfloat16,
            quantization_config=loaded.quantization_config,
            max_shard_bytes=10**9,
            digests=loaded.digests,
        )
        return Trained(source, rows_to_learn(40, seed=1), adapter)

    return make

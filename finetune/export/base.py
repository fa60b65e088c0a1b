"""An export format is one file in `finetune/export/formats/` that writes a directory and says who reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters.base import Adapter


@dataclass(frozen=True)
class ExportSource:
    """Everything a format may draw on.

    Attributes:
        model: the adapted model, in memory.
        adapter: what is attached to it; None exports the base itself.
        tokenizer: a transformers tokenizer whose chat template is the one trained with.
        base_path: directory of the base checkpoint, or its hub id.
        dtype: 16-bit (or 32-bit) dtype of weights that are not quantized.
        quantization_config: how the base is stored, in transformers' terms; None for a dense one.
        max_shard_bytes: largest safetensors file.
    """

    model: nn.Module
    adapter: Adapter | None
    tokenizer: Any
    base_path: str
    dtype: torch.dtype
    quantization_config: dict[str, Any] | None
    max_shard_bytes: int


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        name: as in `export.formats`.
        runtime: who reads it, in words, e.g. "transformers (AutoModelForCausalLM)".
        loader: which loader of the proof client opens it: "causal_lm" or "peft".
        needs_merge: whether the adapter has to be mergeable.
        write: writes a new, empty directory.
    """

    name: str
    runtime: str
    loader: str
    needs_merge: bool
    write: Callable[[ExportSource, Path], None]


@dataclass
class Proof:
    """What export.json holds. Losses are per token, KL in nats per token, against the unmerged model."""

    format: str
    runtime: str
    bytes: int
    bits_per_weight: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    loss_base: float
    loss_trained: float
    loss_export: float
    rows: int
    retained: float | None
    passed: bool
    reason: str = ""
    format_version: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

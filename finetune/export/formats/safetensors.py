"""The merged model as a stock 16-bit checkpoint: what any runtime that reads Hugging Face checkpoints opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from finetune.export.base import ExportSource, Format, Written
from finetune.export.directory import narrowed
from finetune.export.merge import Stock, merged_weights
from finetune.export.stock import write_config, write_tokenizer, write_weights


def write(source: ExportSource, directory: Path) -> Written:
    """Merge in float32, round once to `source.dtype`, write under the family's own names."""
    stock = Stock.of(source.model)
    untied = False

    def weights() -> Iterator[tuple[str, Tensor]]:
        nonlocal untied
        for name, weight in merged_weights(source, stock):
            untied |= name in stock.tied
            yield name, narrowed(weight, source.dtype)

    write_weights(source, stock, weights(), directory)
    write_config(source, directory, untied=untied)
    write_tokenizer(source, directory)
    return Written(weights=stock.parameters())


FORMAT = Format(
    name="safetensors",
    runtime="transformers (AutoModelForCausalLM)",
    loader="checkpoint",
    needs_merge=True,
    advice="keep the adapter beside its base (export.formats=[peft]), or train in fp32",
    lossless=True,
    write=write,
)

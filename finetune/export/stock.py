"""Whatever a stock checkpoint holds besides its weights, and the names it stores them under."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.export.base import ExportSource, has_own_code
from finetune.export.directory import ShardWriter
from finetune.export.merge import Stock


def write_weights(source: ExportSource, stock: Stock, weights: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Write weights under the names that the checkpoints of this family use on disk.

    Some families are renamed or restacked when transformers 5 loads them (the experts of a Mixtral become one 3-D
    parameter). For those the whole state dict has to be at hand to be turned back; for all others one shard is.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if get_model_conversion_mapping(stock.model, add_legacy=False):
        weights = revert_weight_conversion(stock.model, dict(weights)).items()
    writer = ShardWriter(directory, source.max_shard_bytes)
    for name, weight in weights:
        writer.add(name, weight)
    writer.finish()


def write_config(
    source: ExportSource, directory: Path, *, untied: bool, quantization_config: dict[str, Any] | None = None
) -> None:
    """Write config.json and generation_config.json of the base, with the dtype, tying and quantization of the export.

    A model whose Python came with its checkpoint takes that along.

    Args:
        untied: training has made the head differ from the embeddings that it was tied to.
    """
    config = copy.deepcopy(source.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if quantization_config is not None:
        config.quantization_config = quantization_config
    if untied:
        config.tie_word_embeddings = False
    config.dtype = source.dtype
    config.architectures = [type(source.model).__name__]
    config.save_pretrained(directory)
    if has_own_code(source.model) and Path(source.base_path).is_dir():
        for module in sorted(Path(source.base_path).glob("*.py")):
            shutil.copyfile(module, directory / module.name)
    generation = getattr(source.model, "generation_config", None)
    if generation is not None:
        # Not save_pretrained: that refuses published configurations which hold a harmless contradiction.
        generation.to_json_file(directory / "generation_config.json", use_diff=True)


def write_tokenizer(source: ExportSource, directory: Path) -> None:
    """Write the tokenizer with the chat template that was trained with."""
    source.tokenizer.save_pretrained(directory)

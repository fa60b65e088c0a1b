"""What prompt tuning and P-tuning v1 share: virtual tokens that are embeddings, in files that PEFT reads and writes.

Shape suffixes: L virtual tokens, H features of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from finetune.adapters import peft_prompts
from finetune.adapters.full_copy import resolve_modules
from finetune.adapters.input import EMBEDDINGS, InputConfig
from finetune.adapters.inserted import InsertedAdapter
from finetune.adapters.prompt_start import LargeStartConfig
from finetune.errors import ConfigError, ModelError
from finetune.structure import inspect as inspect_model

Config = TypeVar("Config", bound=InputConfig)


class SavedPromptAdapter(InsertedAdapter):
    """Embeddings before every row, saved as PEFT saves them."""

    method: ClassVar[str]
    """PEFT's name of the method."""

    def inserted(self) -> Tensor:
        """[L, H]: what trains, or what comes out of it."""
        values_LH: Tensor = self.encoder()
        return values_LH

    def saved_shape(self) -> tuple[int, int]:
        """[L, H], as PEFT."""
        return self.config.prefix_length, self.width

    @torch.no_grad()
    def token_start(self, config: LargeStartConfig) -> Tensor | None:
        """[L, H], float32 on the CPU: embeddings of tokens (scaled, where the module scales), as PEFT has them, and
        scaled as configured. None for a random start.
        """
        embedding: Any = self.embedding()
        if embedding.weight.is_meta:
            return torch.empty(self.saved_shape())
        ids_L = config.start_ids(embedding.weight.shape[0])
        if ids_L is None:
            return None
        start_LH: Tensor = embedding(ids_L.to(embedding.weight.device)).float().cpu()
        return start_LH * config.scale_of_start()

    def written(self, **more: Any) -> dict[str, Any]:
        """adapter_config.json as stock PEFT reads it."""
        return peft_prompts.written(
            self.method, self.model, self.structure, *self.saved_shape(), whole=list(self.copies), **more
        )

    def check_settings(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Refuse another length or width, and what we do not compute."""
        theirs = peft_prompts.read_saved(directory, self.method)
        for key, mine, value in (
            ("num_virtual_tokens", self.config.prefix_length, theirs.prefix_length),
            ("token_dim", self.width, theirs.width),
        ):
            if mine != value:
                raise ModelError(f"adapter {directory} has {key} {value}, but here it is {mine}")

    def from_file(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the second set of virtual tokens, which PEFT keeps for a decoder and does not use."""
        if config.get("num_transformer_submodules") == 2 and EMBEDDINGS in tensors:
            values, length = tensors[EMBEDDINGS], self.config.prefix_length
            if values.dim() == 2 and len(values) == 2 * length:
                return tensors | {EMBEDDINGS: values[:length]}
        return tensors


def agreed(config: Config, directory: Path, method: str, model: nn.Module | None = None) -> Config:
    """The configuration with a saved adapter's length and, where a model is given, its modules.

    Raises:
        ModelError: when it cannot be read, is of another method, or asks for something we do not compute.
        ConfigError: for a length or modules that are neither the default nor what was saved, naming both.
    """
    saved = peft_prompts.read_saved(directory, method)
    default = next(field.default for field in fields(config) if field.name == "prefix_length")
    if config.prefix_length not in (default, saved.prefix_length):
        raise ConfigError(
            f"adapter.prefix_length is {config.prefix_length}, but the adapter {directory} has {saved.prefix_length}:"
            " leave adapter.prefix_length out"
        )
    config = replace(config, prefix_length=saved.prefix_length)
    if model is None:
        return config
    structure = inspect_model(model)
    names = peft_prompts.present(model, saved.modules_to_save)
    whole = resolve_modules(model, structure, names)
    if config.train_also and resolve_modules(model, structure, config.train_also) != whole:
        raise ConfigError(
            f"adapter.train_also is {config.train_also}, but the adapter {directory} has {whole}: leave it out"
        )
    return replace(config, train_also=whole)

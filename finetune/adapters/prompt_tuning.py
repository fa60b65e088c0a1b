"""Prompt tuning: the embeddings of virtual tokens before every row are trained, and nothing else.

Lester et al. 2021 (arXiv:2104.08691) section 2; L H parameters for L virtual tokens of H features. Starts as embeddings
of tokens drawn from the vocabulary, which section 3.2 finds better than random ones, or as those of a text.

Shape suffixes: L virtual tokens, H features of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters.base import ADAPTERS
from finetune.adapters.input import Materialised, PromptEncoder
from finetune.adapters.prompt_start import LargeStartConfig
from finetune.adapters.saved_prompt import SavedPromptAdapter, agreed

METHOD = "PROMPT_TUNING"
"""PEFT's name."""


@dataclass
class PromptTuningConfig(LargeStartConfig):
    """Prompt tuning.

    With `path`, the saved adapter decides prefix_length and train_also. The default length is the paper's.
    """

    name: str = "prompt_tuning"
    prefix_length: int = 100
    learning_rate: float = 0.4

    def check_saved(self, directory: Path) -> None:
        """Refuse another method, settings that we do not compute, and another length than set here."""
        agreed(self, directory, METHOD)


class PromptTuningAdapter(SavedPromptAdapter):
    """Prompt tuning attached to a model; see `PromptTuningConfig`."""

    config: PromptTuningConfig
    method = METHOD

    def make_encoder(self) -> PromptEncoder:
        """The virtual tokens themselves, [L, H]; torch's default for an embedding where they start at random."""
        start = self.token_start(self.config)
        return Materialised(nn.Embedding(*self.saved_shape()).weight.detach() if start is None else start)

    def file_config(self) -> dict[str, Any]:
        """adapter_config.json as stock PEFT reads it; the start plays no part after training."""
        return self.written(prompt_tuning_init="RANDOM")


@ADAPTERS.register(PromptTuningConfig)
def build(config: PromptTuningConfig, model: nn.Module) -> PromptTuningAdapter:
    """Attach prompt tuning to a model; `config.path` decides the length here, its tensors are loaded by `attach`."""
    if config.path is not None:
        config = agreed(config, Path(config.path), METHOD, model)
    return PromptTuningAdapter(config, model)

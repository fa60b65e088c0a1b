"""P-tuning v1: virtual tokens before every row, given by a small network while they train.

Liu et al. 2021 (arXiv:2103.10385) section 3: virtual tokens that depend on one another train better than free ones, so
they are the outputs of a bidirectional LSTM with a two-layer perceptron behind it. As in PEFT (`PromptEncoder`), they
all stand before the row, an LSTM has `encoder_hidden_size` features in each direction, and a plain perceptron of three
layers may take its place. The network is dropped once trained: its outputs are what is saved.

Shape suffixes: L virtual tokens, H features of an embedding, E features within the network.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.adapters.base import ADAPTERS
from finetune.adapters.input import PromptEncoder, size
from finetune.adapters.prompt_start import LargeStartConfig
from finetune.adapters.rates import WIDTH
from finetune.adapters.saved_prompt import SavedPromptAdapter, agreed
from finetune.errors import ConfigError, nearest

METHOD = "P_TUNING"
"""PEFT's name."""
ENCODERS = ("lstm", "mlp")


@dataclass
class PTuningConfig(LargeStartConfig):
    """P-tuning v1.

    With `path`, the saved adapter decides prefix_length and train_also, and its virtual tokens train without a network.
    Unless `init` is random, as in the paper, what the network gives, at first nothing, is added to embeddings of
    tokens, which train too.

    Attributes:
        ratio: these learn at so many times the rate of the network, as a share of their size.
        encoder: lstm | mlp.
        encoder_hidden_size: features within the network (of the LSTM, in each direction); null for those of an
            embedding.
        encoder_layers: of the LSTM.
        encoder_dropout: between the layers of the LSTM, while training.
    """

    name: str = "p_tuning"
    learning_rate: float = 0.002
    prefix_length: int = 100
    ratio: float = 200.0
    encoder: str = "lstm"
    encoder_hidden_size: int | None = None
    encoder_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.ratio > 0 and math.isfinite(self.ratio)):
            raise ConfigError(f"adapter.ratio is {self.ratio}: expected more than 0")
        if self.encoder not in ENCODERS:
            raise ConfigError(
                f"adapter.encoder is {self.encoder!r}: expected {' | '.join(ENCODERS)}{nearest(self.encoder, ENCODERS)}"
            )
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ConfigError(
                f"adapter.encoder_hidden_size is {self.encoder_hidden_size}: expected at least 1, or null"
            )
        if self.encoder_layers < 1:
            raise ConfigError(f"adapter.encoder_layers is {self.encoder_layers}: expected at least 1")
        if not 0 <= self.encoder_dropout < 1:
            raise ConfigError(f"adapter.encoder_dropout is {self.encoder_dropout}: expected 0 or more and less than 1")

    def check_saved(self, directory: Path) -> None:
        """Refuse another method, settings that we do not compute, and another length than set here."""
        agreed(self, directory, METHOD)


class PTuningEncoder(PromptEncoder):
    """The network; its parts have the names that PEFT gives them.

    Args:
        config: for its kind, layers and dropout.
        width: H.
        start: [L, H], what its outputs are added to; None for nothing.
    """

    def __init__(self, config: PTuningConfig, width: int, start: Tensor | None) -> None:
        super().__init__()
        self.inner = inner = config.encoder_hidden_size or width
        self.embedding = nn.Embedding(config.prefix_length, width)
        self.lstm_head: nn.LSTM | None = None
        if config.encoder == "lstm":
            between = config.encoder_dropout if config.encoder_layers > 1 else 0.0
            self.lstm_head = nn.LSTM(
                width, inner, config.encoder_layers, dropout=between, bidirectional=True, batch_first=True
            )
            sizes: tuple[int, ...] = (2 * inner, 2 * inner, width)
        else:
            sizes = (width, inner, inner, width)
        layers: list[nn.Module] = []
        for first, second in itertools.pairwise(sizes):
            layers += [nn.Linear(first, second), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])
        self.start = None if start is None else nn.Parameter(start)
        if start is not None:
            last: Any = self.mlp_head[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self) -> Tensor:
        """[L, H]."""
        x_LE = self.embedding.weight
        if self.lstm_head is not None:
            x_LE = self.lstm_head(x_LE[None])[0][0]
        out_LH: Tensor = self.mlp_head(x_LE)
        return out_LH if self.start is None else self.start + out_LH

    def learning_rate_scales(self, ratio: float) -> dict[str, float]:
        """The rate of a network falls with its width; what comes out of it moves what it is added to by a share of its
        size as well."""
        falls = min(1.0, WIDTH / self.inner)
        scales = {name: falls for name, _ in self.named_parameters() if name != "start"}
        if self.start is None:
            return scales
        share, last = size(self.start), f"mlp_head.{len(self.mlp_head) - 1}"
        moved = {f"{last}.weight": falls * share, f"{last}.bias": falls * share}
        return scales | moved | {"start": ratio * share}


class PTuningAdapter(SavedPromptAdapter):
    """P-tuning v1 attached to a model; see `PTuningConfig`."""

    config: PTuningConfig
    method = METHOD

    def make_encoder(self) -> PromptEncoder:
        """The network, as torch initialises its layers but for the last where it starts from tokens."""
        return PTuningEncoder(self.config, self.width, self.token_start(self.config))

    @property
    def ratio(self) -> float:
        """As configured."""
        return self.config.ratio

    def file_config(self) -> dict[str, Any]:
        """adapter_config.json as stock PEFT reads it; of the network it says what it was."""
        return self.written(
            encoder_reparameterization_type=self.config.encoder.upper(),
            encoder_hidden_size=self.config.encoder_hidden_size or self.width,
            encoder_num_layers=self.config.encoder_layers,
            encoder_dropout=self.config.encoder_dropout,
        )


@ADAPTERS.register(PTuningConfig)
def build(config: PTuningConfig, model: nn.Module) -> PTuningAdapter:
    """Attach P-tuning to a model; `config.path` decides the length here, its tensors are loaded by `attach`."""
    if config.path is not None:
        config = agreed(config, Path(config.path), METHOD, model)
    return PTuningAdapter(config, model)

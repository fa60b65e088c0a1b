"""Fewer channels of the feed-forwards: a gate, an up and a down projection lose as many rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.errors import ConfigError
from finetune.quant.pruners.base import PRUNERS
from finetune.quant.pruners.cut import part_of
from finetune.quant.pruners.narrow import Narrow
from finetune.quant.pruners.units import NarrowConfig
from finetune.structure import inspect
from finetune.structure.base import Projection
from finetune.structure.widths import Build, feedforward_outputs, narrow_channels


@dataclass
class ChannelsConfig(NarrowConfig):
    """Settings of cutting channels.

    Attributes:
        multiple_of: what stays is rounded up to a multiple of it where the width is one, so that groups of weights and
            matrix units still divide it.
    """

    name: str = "channels"
    multiple_of: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple_of < 1:
            raise ConfigError(f"pruner.multiple_of is {self.multiple_of}: expected 1 or more")

    def kept(self, width: int) -> int:
        """How many of so many channels stay."""
        stay = width - part_of(self.sparsity, width)
        return stay if width % self.multiple_of else -(-stay // self.multiple_of) * self.multiple_of


@PRUNERS.register(ChannelsConfig)
class Channels(Narrow):
    """Takes channels out of every feed-forward; each expert of a mixture has its own."""

    what = "channels"
    settings: ChannelsConfig

    def narrowed(self, model: nn.Module, build: Build) -> Any:
        outputs = feedforward_outputs(model)
        widths = {p.in_features for p in inspect(model).projections if p.name in outputs}
        if all(self.settings.kept(width) == width for width in widths):
            raise ConfigError(
                f"pruner.sparsity is {self.settings.sparsity}, which is none of the {max(widths)} channels of"
                f" {type(model).__name__} in multiples of {self.settings.multiple_of}: expected more, or a smaller"
                " pruner.multiple_of"
            )
        return narrow_channels(model, self.settings.kept, build)

    def units(self, reader: Projection) -> int:
        return reader.in_features

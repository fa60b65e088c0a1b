"""Keep: the base stays as its checkpoint stores it, quantized or dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from finetune.errors import ConfigError
from finetune.quant.base import QUANTIZERS, QuantConfig


@dataclass
class KeepConfig(QuantConfig):
    """Take the format from the checkpoint: what loading resolves to one of the other configs."""

    name: str = "keep"


@QUANTIZERS.register(KeepConfig)
def build(config: KeepConfig, *args: Any, **options: Any) -> NoReturn:
    """There is nothing to build before a checkpoint has been read.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("quant=keep takes the format from a checkpoint: choose another for a model in memory")

"""No transform: the dense model is quantized as it is."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.quant.transforms.base import TRANSFORMS, TransformConfig


@dataclass
class NoTransformConfig(TransformConfig):
    """No settings, and no data."""

    name: str = "none"


@TRANSFORMS.register(NoTransformConfig)
def build(config: NoTransformConfig) -> None:
    """Nothing."""

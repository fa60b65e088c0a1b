"""Random weights and inputs, and empty frozen modules, that the tests of this room share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.quant.base import QUANTIZERS, QuantConfig


def name(config: QuantConfig) -> str:
    """A configuration in the name of a test."""
    return "-".join(str(value) for value in vars(config).values())


def empty(config: QuantConfig, *shape: int) -> Any:
    """A frozen linear [O, I], or a stack [E, O, I]."""
    if len(shape) == 3:
        return QUANTIZERS.build(config, *shape[1:], experts=shape[0], dtype=torch.float32)
    return QUANTIZERS.build(config, *shape, dtype=torch.float32)


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Normally distributed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram(columns: int, mixing: float = 0.5, seed: int = 2) -> Tensor:
    """Of inputs that are mixed among each other."""
    mix = torch.eye(columns) + mixing * normal(columns, columns, seed=seed) / columns**0.5
    x_NI = normal(4 * columns, columns, seed=seed + 1) @ mix
    return x_NI.T @ x_NI


def correlated(columns: int, rows: int = 1024) -> Tensor:
    """Inputs whose spectrum falls off as a power, mixed, with a few heavy channels: what hidden states look like."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, columns + 1, dtype=torch.float32) ** -0.7
    mix, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    x_NI = (torch.randn(rows, columns, generator=generator) * spectrum) @ mix
    x_NI[:, :6] *= 5
    return x_NI

"""When two results count as one, and what is said of a module that was to be exchanged; see exchange.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exchanged:
    """What became of a candidate.

    Attributes:
        name: of the module.
        kind: "norm", "gated MLP", "attention" or "rotary attention".
        reason: why it stayed as it was; empty where it was exchanged.
    """

    name: str
    kind: str
    reason: str = ""


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results are one up to rounding: 4 epsilons of their dtype (1e-5 at least) of each row's largest."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    tolerance = max(1e-5, 4 * torch.finfo(wanted.dtype).eps)
    size = wanted.abs().amax(-1, keepdim=True).float()
    return bool(((found.float() - wanted.float()).abs() <= tolerance * size + 1e-30).all())


def noise(*shape: int) -> Tensor:
    """Normal values, the same at every call; the global generator is left alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

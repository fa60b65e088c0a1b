"""Operators and autocast: an operator casts before it is called, never inside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Autocast would otherwise act a second time, on the tensors inside, and contradict the fake implementation."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

"""How much of a weight the plain operators handle at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Weights that each CPU core handles at a time: the temporaries stay in its cache. A multiple of every block size."""


def chunk(device: torch.device) -> int:
    """Weights a step: what fits a core's cache, times the cores; on an accelerator much more, to keep it busy."""
    return CHUNK * (min(torch.get_num_threads(), 16) if device.type == "cpu" else 256)


def row_parts(w_RI: Tensor) -> Iterator[slice]:
    """The rows of a matrix, so many at a time."""
    rows, width = w_RI.shape
    step = max(1, chunk(w_RI.device) // max(width, 1))
    yield from (slice(start, start + step) for start in range(0, rows, step))

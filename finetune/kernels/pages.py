"""Memory for large outputs whose pages are used again.

glibc's malloc maps blocks of 32 MiB and more anew at every call, and the kernel clears each page when it is first
touched: decoding a 4096 x 4096 weight takes a tenth of the time that its fresh pages do. So such an output lies in
pages of our own, in units of 2 MiB, and when the last tensor on them dies they serve the next one. At most one block of
them waits, of at most 256 MiB.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

SMALLEST = 32 << 20
"""Bytes from which malloc maps at every call (mallopt(3), M_MMAP_THRESHOLD): smaller blocks it uses again itself."""
LARGEST_SPARE = 256 << 20
_HUGE_PAGE = 2 << 20

_lock = threading.Lock()
_spare: list[mmap.mmap] = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, bool]:
    """An uninitialised tensor on the CPU, and whether its pages are known to have been written before."""
    size = prod(shape) * dtype.itemsize
    if size < SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype), False
    pages = _take(size)
    recycled = pages is not None
    if pages is None:
        pages = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the view, and the view's end says that no tensor is left.
    view = (ctypes.c_char * size).from_buffer(pages)
    weakref.finalize(view, _give_back, pages).atexit = False
    return torch.frombuffer(view, dtype=dtype).view(tuple(shape)), recycled


def _take(size: int) -> mmap.mmap | None:
    """The waiting pages where they fit; where they do not, they go."""
    with _lock:
        pages = _spare.pop() if _spare else None
    return pages if pages is not None and size <= len(pages) <= 2 * size else None


def _give_back(pages: mmap.mmap) -> None:
    with _lock:
        if not _spare and len(pages) <= LARGEST_SPARE:
            _spare.append(pages)

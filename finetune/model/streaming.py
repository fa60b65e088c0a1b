"""Keep the memory of a load at the quantized model plus about one shard.

Two things make a straightforward load take more, both of Linux and glibc, and both cured here for the time of the load
only:

- transformers maps every shard and reads slices of the mappings, so each page it has touched stays resident until the
  last shard is closed: the resident set ends at the whole 16-bit checkpoint. The pages are clean copies of the file;
  `madvise(MADV_DONTNEED)` gives them back and a later touch reads them again.
- glibc raises its mmap threshold whenever a large block is freed, after which the dense temporaries of quantization
  come from the heap and fragment it. A fixed threshold keeps them in mappings of their own, which go back to the system
  when freed.

Elsewhere nothing is done and a load takes more memory.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

RELEASE_EVERY = 64 << 20
"""Bytes of checkpoint that may be read before their pages are given back."""

MADV_DONTNEED = 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LOADING_THRESHOLD = 1 << 20
USUAL_MMAP_THRESHOLD, USUAL_TRIM_THRESHOLD = 32 << 20, 64 << 20
"""Where glibc's own dynamic thresholds end up in a process that works on large tensors (mallopt(3)); setting one ends
the adjustment for good, so this is what we leave behind."""


def _libc() -> ctypes.CDLL | None:
    """The C library where it is glibc on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version") else None


def mapped_ranges(suffix: str = ".safetensors") -> list[tuple[int, int]]:
    """Address ranges [start, end) that map files of that suffix; empty where the system does not say."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            lines = [line.split(maxsplit=5) for line in maps if suffix in line]
    except OSError:
        return []
    ranges = [
        line[0].split("-")
        for line in lines
        if len(line) == 6 and line[5].strip().removesuffix(" (deleted)").endswith(suffix)
    ]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


class PageRelease:
    """Gives the pages of mapped checkpoint files back after every so many bytes read."""

    def __init__(self, every: int = RELEASE_EVERY) -> None:
        self._every, self._read, self._libc = every, 0, _libc()

    def consumed(self, tensor: Tensor) -> None:
        """Count a tensor that has been read and is not needed any more."""
        self._read += tensor.numel() * tensor.element_size()
        if self._read >= self._every:
            self.release()

    def release(self) -> None:
        """Give all pages of mapped checkpoint files back."""
        self._read = 0
        if self._libc is None:
            return
        for start, end in mapped_ranges():
            self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


_ENTERED = [0]
"""How many `fixed_thresholds` are entered: they are fixed until the outermost is left."""


@contextmanager
def fixed_thresholds() -> Iterator[None]:
    """Within it glibc maps every block of 1 MiB and more separately; afterwards the free heap is given back."""
    libc = _libc()
    if libc is None or _ENTERED[0]:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LOADING_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, LOADING_THRESHOLD)
    _ENTERED[0] += 1
    try:
        yield
    finally:
        _ENTERED[0] -= 1
        libc.mallopt(M_MMAP_THRESHOLD, USUAL_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)
        libc.malloc_trim(0)


def own_memory(model: nn.Module, pages: PageRelease) -> None:
    """Copy every CPU parameter and buffer that aliases a mapped file: overwriting the file cannot change the model.

    Tied tensors stay tied: the data of the shared parameter is replaced in place.
    """
    ranges = mapped_ranges()
    system_says = sys.platform.startswith("linux")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type != "cpu":
                continue
            address = tensor.untyped_storage().data_ptr()
            if not system_says or any(start <= address < end for start, end in ranges):
                tensor.data = tensor.data.clone()
                pages.consumed(tensor)
    pages.release()

"""The compiled CPU kernels: loading them, why they are off, and what ctypes needs to call them.

`pip install` builds `_native.so` from csrc/ where there is a C++ compiler (setup.py). Without it everything runs on the
reference in plain torch. Each `cpu_*.py` beside this file registers the operators that the library serves.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch  # also for its OpenMP runtime: loaded before our library, so that both share one pool of threads
from torch import Tensor

LIBRARY = Path(__file__).with_name("_native.so")
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
"""What a CPU offers, in the order of csrc/native.h. `FINETUNE_CPU` names the highest to use, or `off`."""
ABI = 6
"""Counts the versions of the library's interface, here and in csrc/native.cpp: raise both with any function that is
new, gone or called otherwise, so that a library left over from another version is not called."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types as csrc/native.h numbers them."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are off; `why_off` says why."""
    if why_off() is not None:
        return None
    found = ctypes.CDLL(str(LIBRARY))
    asked = os.environ.get("FINETUNE_CPU")
    if asked:
        found.ft_set_level(LEVELS.index(asked))
    return found


@cache
def why_off() -> str | None:
    """Why the compiled kernels cannot be used; None where they can."""
    asked = os.environ.get("FINETUNE_CPU")
    if asked == "off":
        return "FINETUNE_CPU=off"
    if asked and asked not in LEVELS:
        return f"FINETUNE_CPU={asked}: expected off, {', '.join(LEVELS)}"
    if not LIBRARY.is_file():
        return "not compiled: install again where there is a C++ compiler (pip install --force-reinstall --no-deps)"
    try:
        abi = getattr(ctypes.CDLL(str(LIBRARY)), "ft_abi", int)()
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    if abi != ABI:
        return f"{LIBRARY.name} is of another version of finetune (interface {abi}, expected {ABI}): install again"
    return None


def level() -> str:
    """The instruction set in use, one of `LEVELS`; "off" where the compiled kernels are."""
    found = library()
    return "off" if found is None else LEVELS[found.ft_level()]


@contextmanager
def at_most(name: str) -> Iterator[None]:
    """Within it the compiled kernels use no more than a level: what tests and measurements compare."""
    found = library()
    if found is None:
        yield
        return
    before = found.ft_level()
    found.ft_set_level(LEVELS.index(name))
    try:
        yield
    finally:
        found.ft_set_level(before)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def threads() -> int:
    """How many threads a kernel may use: torch's count, which OpenMP does not know of in every thread."""
    return torch.get_num_threads()

"""The compiled kernels of dropout's operators on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from finetune.kernels import native


def register(zero_reference: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Put the kernels before the reference, where there is a compiled library.

    Args:
        zero_reference: `zero_dropped` for elements that are neither 2 nor 4 bytes wide.
    """
    found = native.library()
    if found is None:
        return
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    found.ft_kept_bits.argtypes = [ctypes.c_uint64, int64, int64, pointer, int32]
    found.ft_kept_bits.restype = None
    found.ft_zero_dropped.argtypes = [int32, pointer, pointer, int64, pointer, int32]
    found.ft_zero_dropped.restype = None
    library = found

    def kept_bits(seed: Tensor, count: int, threshold: int) -> Tensor:
        out_K = torch.empty((count + 7) // 8, dtype=torch.uint8)
        library.ft_kept_bits(int(seed) % 2**64, threshold, len(out_K), out_K.data_ptr(), native.threads())
        return out_K

    def zero_dropped(x: Tensor, kept_K: Tensor) -> Tensor:
        if x.element_size() not in (2, 4):
            return zero_reference(x, kept_K)
        x, kept_K = x.contiguous(), kept_K.contiguous()
        out = torch.empty_like(x)
        library.ft_zero_dropped(
            x.element_size(), x.data_ptr(), kept_K.data_ptr(), x.numel(), out.data_ptr(), native.threads()
        )
        return out

    torch.library.impl("finetune::kept_bits", "cpu")(kept_bits)
    torch.library.impl("finetune::zero_dropped", "cpu")(zero_dropped)

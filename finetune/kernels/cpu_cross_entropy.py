"""The compiled kernel of `finetune::cross_entropy_` on a CPU.

Shape suffixes: C positions of one chunk, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from finetune.kernels import native


def register() -> None:
    """Put the kernel before the reference, where there is a compiled library."""
    found = native.library()
    if found is None:
        return
    pointer, int32, int64, real = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
    found.ft_cross_entropy.argtypes = [int32, pointer, pointer, int64, int64, real, real, int32, pointer, int32]
    found.ft_cross_entropy.restype = int64
    torch.library.impl("finetune::cross_entropy_", "cpu")(_cross_entropy)


def _cross_entropy(z_CV: Tensor, labels_C: Tensor, scale: float, softcap: float | None, gradient: bool) -> Tensor:
    # Other dtypes, and rows that do not follow one another, by way of a float32 copy.
    fits = z_CV.dtype in (torch.float32, torch.bfloat16) and z_CV.is_contiguous()
    logits_CV = z_CV if fits else z_CV.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    labels_C = labels_C.contiguous()
    losses_C = torch.empty(len(labels_C), dtype=torch.float32)
    library = native.library()
    assert library is not None
    bad = library.ft_cross_entropy(
        native.DTYPES[logits_CV.dtype],
        logits_CV.data_ptr(),
        labels_C.data_ptr(),
        *logits_CV.shape,
        scale,
        softcap or 0.0,
        gradient,
        losses_C.data_ptr(),
        native.threads(),
    )
    if bad >= 0:
        raise IndexError(f"label {int(labels_C[bad])} at position {bad}: expected 0 to {logits_CV.shape[1] - 1}")
    if gradient and not fits:
        z_CV.copy_(logits_CV)
    return losses_C.sum()

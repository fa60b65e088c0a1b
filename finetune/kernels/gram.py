"""Second moments of inputs, summed up in float32: most of what calibration computes besides the model.

Shape suffixes: N inputs, I in features.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from finetune.kernels import native

PANEL = 256
"""Rows of the symmetric matrix that are computed from their own diagonal block on."""


def add_gram_(sum_II: Tensor, x_NI: Tensor) -> None:
    """Add x^T x, on and right of the diagonal blocks of `PANEL`; what is left of them stays as it is.

    Products and sums are float32; the compiled kernel, which takes bf16 inputs alone, sums in another order.

    Args:
        sum_II: float32.
        x_NI: in any float dtype, on the same device.
    """
    library = _library() if x_NI.device.type == "cpu" and x_NI.dtype == torch.bfloat16 else None
    x_NI = x_NI.detach().contiguous()
    arguments = (x_NI.data_ptr(), *x_NI.shape, sum_II.data_ptr(), native.threads())
    if library is None or not library.ft_gram(*arguments):
        reference(sum_II, x_NI)


def reference(sum_II: Tensor, x_NI: Tensor) -> None:
    """As `add_gram_`, in plain torch."""
    x_NI = x_NI.float()
    for start in range(0, x_NI.shape[1], PANEL):
        sum_II[start : start + PANEL, start:].addmm_(x_NI[:, start : start + PANEL].T, x_NI[:, start:])


def mirror_(sum_II: Tensor) -> None:
    """Write what stands right of the diagonal to the left of it as well."""
    for start in range(0, len(sum_II), PANEL):
        panel = slice(start, start + PANEL)
        sum_II[panel, :start] = sum_II[:start, panel].T
        sum_II[panel, panel] = sum_II[panel, panel].triu() + sum_II[panel, panel].triu(1).T


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels with the signature of this file's function set."""
    found = native.library()
    if found is not None:
        pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        found.ft_gram.argtypes = [pointer, int64, int64, pointer, int32]
        found.ft_gram.restype = ctypes.c_bool
    return found

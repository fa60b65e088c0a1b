"""The compiled kernels of outputs at learnt lengths on a CPU; what they do not serve goes to the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from finetune.kernels import native

_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_DTYPES = (torch.float32, torch.bfloat16)


@cache
def _library() -> ctypes.CDLL | None:
    """The library with the signatures of this file's functions set."""
    found = native.library()
    if found is not None:
        found.ft_scale_outputs.argtypes = [_int64, _int64, _pointer, _int, *[_pointer] * 3, _int]
        found.ft_scale_outputs_backward.argtypes = [_int64, _int64, _pointer, _pointer, _int, *[_pointer] * 5, _int]
        found.ft_scale_outputs.restype = found.ft_scale_outputs_backward.restype = ctypes.c_bool
    return found


def scale_outputs_(
    y: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, reference: Callable[..., None]
) -> None:
    """As in lengths.py."""
    library = _library()
    if library is None or y.dtype not in _DTYPES or not y.is_contiguous():
        return reference(y, magnitude, norm, bias)
    wide = [None if vector is None else vector.float().contiguous() for vector in (magnitude, norm, bias)]
    rows, outputs = y.numel() // y.shape[-1], y.shape[-1]
    pointers = map(native.pointer, wide)
    library.ft_scale_outputs(rows, outputs, y.data_ptr(), native.DTYPES[y.dtype], *pointers, native.threads())
    return None


def scale_outputs_backward(
    grad: Tensor,
    scaled: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    reference: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """As in lengths.py."""
    library = _library()
    if library is None or grad.dtype not in _DTYPES or scaled.dtype != grad.dtype:
        return reference(grad, scaled, magnitude, norm, bias)
    grad, scaled = grad.contiguous(), scaled.contiguous()
    wide = [None if vector is None else vector.float().contiguous() for vector in (magnitude, norm, bias)]
    out, grad_magnitude = torch.empty_like(grad), torch.empty_like(magnitude, dtype=torch.float32)
    rows, outputs = grad.numel() // grad.shape[-1], grad.shape[-1]
    library.ft_scale_outputs_backward(
        *(rows, outputs, grad.data_ptr(), scaled.data_ptr(), native.DTYPES[grad.dtype]),
        *(*map(native.pointer, wide), out.data_ptr(), grad_magnitude.data_ptr(), native.threads()),
    )
    return out, grad_magnitude.to(magnitude.dtype)

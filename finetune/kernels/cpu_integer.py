"""Weights in integer codes as the compiled kernels take them: those of kernels/affine.py, int8.py and w8a8.py.

Shape suffixes: O out features, I in features, G groups of a row, P packed bytes of a row.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from finetune.kernels import native
from finetune.kernels.cpu_stored import Stored, addresses

MIDDLE, INTEGER, REAL, SIGNED, PLAIN = range(5)
"""Kinds of zero points, as csrc/integer.h numbers them."""

_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Integer(Stored):
    """`finetune::Integer` of csrc/integer.h."""

    name = "integer"
    _fields_ = (
        ("codes", _pointer),
        ("scale", _pointer),
        ("zero", _pointer),
        ("in_features", _int64),
        ("group", _int64),
        ("groups", _int64),
        ("bytes", _int64),
        ("bits", _int32),
        ("scale_type", _int32),
        ("zeros", _int32),
    )

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, width: int, bits: int, group: int, kind: int) -> Any:
        """A weight whose rows are the last dimension of `codes`; `group` inputs under a scale, -1 for all."""
        alive = (codes.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous())
        groups = 1 if group < 0 else -(-width // group)
        made = cls(
            *addresses(alive), width, width if groups == 1 else group, groups, codes.shape[-1], bits,
            native.DTYPES[scale.dtype], kind,
        )  # fmt: skip
        made.alive = alive
        return made


def affine(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, width: int) -> Integer:
    """The stored tensors of kernels/affine.py as the library takes them."""
    kind = MIDDLE if zero is None else REAL if zero.is_floating_point() else INTEGER
    return Integer.of(codes, scale, zero, width, bits, group_size, kind)


def int8(codes: Tensor, absmax: Tensor, width: int) -> Integer:
    """The stored tensors of kernels/int8.py as the library takes them."""
    return Integer.of(codes, absmax, None, width, 8, -1, SIGNED)


def w8a8(codes: Tensor, scale: Tensor, width: int) -> Integer:
    """The stored tensors of kernels/w8a8.py as the library takes them."""
    groups = scale.shape[-1]
    return Integer.of(codes, scale.expand(*codes.shape[:-1], groups), None, width, 8, width // groups, PLAIN)


def encode_affine(
    w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, group_size: int, packed_width: int
) -> Tensor | None:
    """The nearest codes of a matrix for given scales and zero points, packed, uint8 [O, P]; None where not served."""
    library = native.library()
    if library is None or w_OI.device.type != "cpu" or w_OI.dtype not in native.DTYPES:
        return None
    w_OI = w_OI.contiguous()
    codes_OP = torch.empty(w_OI.shape[0], packed_width, dtype=torch.uint8)
    weight = affine(codes_OP, scale_OG, zero_OG, bits, group_size, w_OI.shape[1])
    encode = library.ft_integer_encode
    encode.argtypes, encode.restype = [_pointer, _int64, _pointer, _int32, _pointer, _int32], None
    kind, rows = native.DTYPES[w_OI.dtype], w_OI.shape[0]
    encode(ctypes.byref(weight), rows, w_OI.data_ptr(), kind, codes_OP.data_ptr(), native.threads())
    return codes_OP

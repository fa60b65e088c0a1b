"""Sparse weights as the compiled kernels take them.

Shape suffixes: O out features, P bytes of a row's places.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from finetune.kernels import native
from finetune.kernels.cpu_stored import Stored, addresses

_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Sparse(Stored):
    """`finetune::Sparse` of csrc/sparse.cpp."""

    name = "sparse"
    _fields_ = (
        ("places", _pointer),
        ("values", _pointer),
        ("offsets", _pointer),
        ("in_features", _int64),
        ("bytes", _int64),
        ("kept", _int32),
        ("group", _int32),
        ("place_bits", _int32),
        ("value_type", _int32),
    )


def sparse(places: Tensor, values: Tensor, kept: int, group: int, place_bits: int, width: int) -> Sparse:
    """The stored tensors of kernels/sparse.py as the library takes them.

    Raises:
        ValueError: where there are not as many values as places say.
    """
    places, values = places.contiguous(), values.contiguous()
    rows = places.numel() // places.shape[-1] if places.numel() else 0
    offsets_O = None if group else _offsets(places, rows)
    held = rows * (width // group) * kept if group else 0 if offsets_O is None else int(offsets_O[-1])
    if held != values.numel():
        raise ValueError(f"the places of a sparse weight name {held} values, and there are {values.numel()}")
    alive = (places, values, offsets_O)
    made = Sparse(*addresses(alive), width, places.shape[-1], kept, group, place_bits, native.DTYPES[values.dtype])
    made.alive = alive
    return made


def _offsets(places_OP: Tensor, rows: int) -> Tensor:
    """Of the first value of each row of a bitmask, int64 [O + 1]; last the number of all."""
    library = native.library()
    assert library is not None
    count = library.ft_sparse_counts
    count.argtypes, count.restype = [_pointer, _int64, _int64, _pointer], None
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    count(places_OP.data_ptr(), rows, places_OP.shape[-1], offsets[1:].data_ptr())
    return offsets.cumsum_(0)

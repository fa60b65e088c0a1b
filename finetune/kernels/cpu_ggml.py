"""llama.cpp's blocks as the compiled kernels take them.

Shape suffixes: O out features, P bytes of a row, K weights of a row that are kept aside.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from finetune.kernels.cpu_stored import Stored, addresses

_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Blocks(Stored):
    """`finetune::Ggml` of csrc/ggml.cpp."""

    name = "ggml"
    _fields_ = (
        ("blocks", _pointer),
        ("places", _pointer),
        ("values", _pointer),
        ("in_features", _int64),
        ("bytes", _int64),
        ("aside", _int64),
        ("size", _int32),
        ("bits", _int32),
        ("least", _int32),
    )


def blocks(
    blocks_OP: Tensor, places_OK: Tensor | None, values_OK: Tensor | None, layout: tuple[int, bool, int], width: int
) -> Blocks:
    """The stored tensors of kernels/ggml.py as the library takes them.

    Args:
        layout: bits of a code, whether a block has a least value, bytes of a block.
        width: inputs of a row.
    """
    bits, least, size = layout
    alive = tuple(None if tensor is None else tensor.contiguous() for tensor in (blocks_OP, places_OK, values_OK))
    wide = blocks_OP.shape[-1]
    aside = 0 if places_OK is None else places_OK.shape[-1] // (wide // size)
    made = Blocks(*addresses(alive), width, wide, aside, size, bits, least)
    made.alive = alive
    return made

"""Read and judge the header of a safetensors file with nothing but the standard library.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length N, N bytes of JSON that maps
tensor names to dtype, shape and [start, end) in the data that follows, without holes, to the end of the file. Judging
the whole header before anything is mapped turns a truncated download into one line instead of a half-loaded model.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ModelError

MAX_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""

LFS_START = b"version https://git-lfs"

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file; start and end are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A judged header: tensors in file order."""

    path: Path
    tensors: tuple[StoredTensor, ...]

    def read(self, tensor: StoredTensor) -> bytes:
        """The bytes of one tensor."""
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            return file.read(tensor.end - tensor.start)


def usual_dtype(headers: Iterable[Header]) -> str:
    """The dtype, by its name in safetensors, that most of a checkpoint's bytes are in; empty where there are none."""
    sizes: dict[str, int] = {}
    for tensor in (tensor for header in headers for tensor in header.tensors):
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.end - tensor.start
    return max(sizes, key=lambda name: sizes[name], default="")


def read_header(path: Path) -> Header:
    """Read and judge a safetensors header.

    Raises:
        ModelError: for a Git LFS pointer, a truncated file, a header that is too large or no JSON, a tensor without
            sense, and ranges that overlap, leave holes or reach beyond the file.
    """
    try:
        return _read(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path) -> Header:
    """Read and judge a header, letting errors of the system through."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(max(8, len(LFS_START)))
        if start.startswith(LFS_START):
            raise ModelError(f"{path} is a Git LFS pointer, not weights: run `git lfs pull` in that directory")
        if len(start) < 8:
            raise ModelError(f"{path} is truncated: {size} bytes, expected a safetensors file")
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER:
            raise ModelError(
                f"{path} is corrupt or no safetensors file: it announces a header of {length} bytes, "
                f"at most {MAX_HEADER} are allowed"
            )
        if 8 + length > size:
            raise ModelError(
                f"{path} is truncated: its header needs {8 + length} bytes and the file has {size}; fetch it again"
            )
        file.seek(8)
        raw = file.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is corrupt: its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise ModelError(f"{path} is corrupt: its header is a {type(entries).__name__}, expected a JSON object")
    entries.pop("__metadata__", None)
    tensors = sorted(
        (_tensor(path, name, entry, 8 + length) for name, entry in entries.items()), key=lambda t: (t.start, t.end)
    )
    _check_ranges(path, tensors, 8 + length, size)
    return Header(path, tuple(tensors))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return dict(pairs)


def _tensor(path: Path, name: str, entry: Any, offset: int) -> StoredTensor:
    """One judged entry of a header."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is corrupt: tensor {name!r} lacks dtype, shape or data_offsets") from error
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)) or end < start:
        raise ModelError(
            f"{path} is corrupt: tensor {name!r} has shape {list(shape)} and data_offsets [{start}, {end}]"
        )
    bits = BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != 8 * (end - start):
        raise ModelError(
            f"{path} is corrupt: tensor {name!r} ({dtype} {list(shape)}) needs {math.prod(shape) * bits // 8} bytes, "
            f"its data_offsets give {end - start}"
        )
    return StoredTensor(name, str(dtype), shape, offset + start, offset + end)


def _check_ranges(path: Path, tensors: list[StoredTensor], begin: int, size: int) -> None:
    """Tensors follow one another without overlap or hole up to the end of the file."""
    reached = begin
    for tensor in tensors:
        if tensor.start < reached:
            raise ModelError(f"{path} is corrupt: tensor {tensor.name!r} overlaps the one before it")
        if tensor.start > reached:
            raise ModelError(
                f"{path} is corrupt: {tensor.start - reached} bytes before tensor {tensor.name!r} belong to none"
            )
        reached = tensor.end
    if reached > size:
        raise ModelError(
            f"{path} is truncated: its tensors need {reached} bytes and the file has {size}; fetch it again"
        )
    if reached < size:
        raise ModelError(f"{path} is corrupt: {size - reached} bytes after its last tensor belong to none")

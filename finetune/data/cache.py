"""Prepared data on disk, found again by a digest of everything it depends on.

One safetensors file an entry: the token arrays, and as metadata a JSON of the rest. It appears by atomic rename; one
that cannot be read is made anew. Nothing here ever stops a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.rows import TokenRows

FORMAT_VERSION = 1
"""Raised whenever the same inputs give other tokens, labels or metadata."""

_ARRAYS = ("input_ids", "labels", "offsets")
_MORE = ("targets", "token_types", "sources")
"""Arrays that only rows with a label have, or those of an encoder and a decoder."""


def cache_directory(configured: str | None) -> Path:
    """`data.cache_dir`, else $FINETUNE_CACHE, else finetune/ in $XDG_CACHE_HOME or ~/.cache."""
    if configured:
        return Path(configured).expanduser()
    if own := os.environ.get("FINETUNE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finetune"


def load(directory: Path, digest: str) -> tuple[dict[str, TokenRows], dict[str, Any]] | None:
    """The entry, or None where there is none that is whole.

    Args:
        directory: of the cache.
        digest: of everything the entry depends on.
    """
    from safetensors import SafetensorError, safe_open

    path = _path(directory, digest)
    try:
        with safe_open(path, "np") as file:
            meta = json.loads((file.metadata() or {})["finetune"])
            if meta["format_version"] != FORMAT_VERSION or meta["digest"] != digest:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        if meta["sha256"] != _sha256(arrays):
            return None
        sides = {side: _rows(arrays, side) for side in meta["sides"]}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    return sides, meta["values"]


def store(directory: Path, digest: str, sides: dict[str, TokenRows], values: dict[str, Any]) -> str | None:
    """Write an entry; the reason in words where that fails.

    Args:
        directory: of the cache; made if need be.
        digest: of everything the entry depends on.
        sides: token rows by name.
        values: what JSON can hold.
    """
    from safetensors.numpy import save

    arrays = {
        f"{side}.{name}": np.ascontiguousarray(getattr(rows, name))
        for side, rows in sides.items()
        for name in _ARRAYS + _MORE
        if getattr(rows, name) is not None
    }
    meta = {
        "format_version": FORMAT_VERSION,
        "digest": digest,
        "sha256": _sha256(arrays),
        "sides": list(sides),
        "values": values,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=".tmp-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save(arrays, {"finetune": json.dumps(meta)}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, _path(directory, digest))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        return f"tokenized rows are not cached in {directory}: {error.strerror or error}"
    return None


def _rows(arrays: dict[str, np.ndarray], side: str) -> TokenRows:
    more = (arrays.get(f"{side}.{name}") for name in _MORE)
    return TokenRows(*(arrays[f"{side}.{name}"] for name in _ARRAYS), *more)


def _path(directory: Path, digest: str) -> Path:
    return directory / f"rows-{digest[:32]}.safetensors"


def _sha256(arrays: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        sha.update(arrays[name].data)
    return sha.hexdigest()

"""Writing an artefact so that whoever looks finds it whole or not at all, in memory for about one shard."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finetune.atomic import fsync

TEMPORARY = ".tmp-export-"
"""Prefix of what is being written, or being thrown away; left behind only by a process that was killed."""


def sweep(parent: Path) -> None:
    """Remove what a killed process left behind in `parent`, in which no other process may be exporting now."""
    for leftover in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name, synced to disk, when the block ends without error.

    An older `target` is moved aside just before and removed just after; a kill in between leaves no `target`, never
    half of one. After an error nothing of the new one is left and the old one stands.
    """
    work, old = target.with_name(f"{TEMPORARY}{target.name}"), target.with_name(f"{TEMPORARY}old-{target.name}")
    for leftover in (work, old):
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        for path in sorted(work.rglob("*")):
            fsync(path)
        fsync(work)
        if target.exists():
            target.rename(old)
        try:
            work.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        fsync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class ShardWriter:
    """Collects tensors and writes a safetensors file whenever the next one would make it larger than asked.

    Args:
        directory: where `model.safetensors`, or numbered shards and their index, are written.
        max_shard_bytes: largest file; a single larger tensor gets a file of its own.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory, self.max_shard_bytes = directory, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is written now or later, always from CPU memory of its own."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu").contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Write what is pending, give the shards their final names, and write the index where there are several.

        Raises:
            OSError: when the disk is full, here as in `add`.
        """
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._draft(0).rename(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._draft(number).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.directory / "model.safetensors.index.json", index)

    def _draft(self, number: int) -> Path:
        return self.directory / f"model-{number + 1:05d}.safetensors"

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._draft(len(self._shards))
        try:
            path.touch()
            mode = path.stat().st_mode  # of any new file; safetensors 0.8 puts one in its place that only we could read
            save_file(self._pending, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        path.chmod(mode)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Strict JSON (no NaN), indented, ending with a newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in the dtype asked for; anything else as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor

"""What a run that was stopped leaves behind, so that the same command goes on after the last finished block.

A hidden directory beside the output, `.<name>.partial`, held by one process at a time through an OS lock that dies with
it:

    manifest.json               settings, digests of base and text, versions: whatever the bytes depend on
    block-00003.safetensors     the block's tensors as they will be stored; what became of its projections is in its
                                metadata. It appears by atomic rename when everything the next block needs is on disk
    <lane>-00004/               hidden states that go into the next block, a file a batch
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.atomic import fsync, write_json
from finetune.errors import ConfigError
from finetune.quant.layer import Layer

FORMAT_VERSION = 2
MANIFEST, LOCK = "manifest.json", "lock"


def partial(target: Path) -> Path:
    """The directory that belongs to an output."""
    return target.with_name(f".{target.name}.partial")


class State:
    """The directory of one run.

    Args:
        target: the output.
        settings: whatever the bytes of the output depend on, as plain values by name.

    Attributes:
        path: the directory.
        finished: blocks that are done.
        layers: what became of their projections.
        summary: what was saved with the last of them.

    Raises:
        ConfigError: where another process works there, or the directory belongs to other settings.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any]) -> None:
        self.path = partial(target)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"output={target} is being written by another process") from error
        try:
            self._agree(target, json.loads(json.dumps(dict(settings))))
            self.finished, self.layers, self.summary = self._read()
        except BaseException:
            self._lock.release()
            raise

    def _agree(self, target: Path, settings: dict[str, Any]) -> None:
        """Compare with what the directory was begun with; begin it where it is new."""
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            write_json(manifest, {"format_version": FORMAT_VERSION, "settings": settings})
            return
        told = json.loads(manifest.read_text("utf-8"))
        anew = f"or delete {self.path} to start anew"
        if told["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"{manifest} has format_version {told['format_version']}, this program reads {FORMAT_VERSION}: quantize"
                f" with the version that began it, {anew}"
            )
        before = told["settings"]
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise ConfigError(
                    f"output={target} was begun with {key}={before.get(key)}, and now it is {settings.get(key)}: go on"
                    f" as it was begun, {anew}"
                )

    def _read(self) -> tuple[int, list[Layer], dict[str, Any]]:
        """How many blocks are done, and what was saved with them."""
        number, layers, summary = 0, [], {}
        while self.part(number).is_file():
            with safe_open(self.part(number), framework="pt") as file:
                metadata = file.metadata()
            layers += [Layer(**layer) for layer in json.loads(metadata["layers"])]
            summary = json.loads(metadata["summary"])
            number += 1
        return number, layers, summary

    def part(self, number: int) -> Path:
        """Where the tensors of a block lie, or will."""
        return self.path / f"block-{number:05d}.safetensors"

    def lane(self, name: str, number: int, device: torch.device | str) -> Spilled:
        """Hidden states that go into a block: those that are there."""
        return Spilled(self.path / f"{name}-{number:05d}", device)

    def new_lane(self, name: str, number: int, device: torch.device | str) -> Spilled:
        """The same, to be filled."""
        directory = self.path / f"{name}-{number:05d}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        return Spilled(directory, device)

    def drop_lane(self, name: str, number: int) -> None:
        """Nobody asks for these hidden states again."""
        shutil.rmtree(self.path / f"{name}-{number:05d}")

    def save(
        self,
        number: int,
        tensors: Mapping[str, Sequence[tuple[str, Tensor]]],
        layers: Sequence[Layer],
        summary: Mapping[str, Any],
    ) -> None:
        """A block is done, what the next one needs is on disk: say so, and drop what only this one needed.

        Args:
            tensors: by their name in the stock model, under which keys each is stored.
        """
        names = {name: [key for key, _ in parts] for name, parts in tensors.items()}
        metadata = {
            "names": json.dumps(names),
            "layers": json.dumps([asdict(layer) for layer in layers]),
            "summary": json.dumps(dict(summary)),
        }
        for lane in self.path.glob(f"*-{number + 1:05d}"):
            for file in (*lane.iterdir(), lane):
                fsync(file)
        temporary = self.part(number).with_suffix(".tmp")
        held = {key: tensor.detach().to("cpu").contiguous() for parts in tensors.values() for key, tensor in parts}
        save_file(held, temporary, metadata=metadata)
        fsync(temporary)
        os.replace(temporary, self.part(number))
        fsync(self.path)
        self.finished = number + 1
        for lane in self.path.glob(f"*-{number:05d}"):
            shutil.rmtree(lane)

    def stored(self) -> dict[str, list[tuple[str, Tensor]]]:
        """The tensors of all finished blocks by their name in the stock model, mapped from their files."""
        found: dict[str, list[tuple[str, Tensor]]] = {}
        for number in range(self.finished):
            tensors = load_file(self.part(number))
            with safe_open(self.part(number), framework="pt") as file:
                names = json.loads(file.metadata()["names"])
            found |= {name: [(key, tensors[key]) for key in keys] for name, keys in names.items()}
        return found

    def close(self, *, keep: bool) -> None:
        """Let go of the directory; where nothing is worth keeping it is deleted."""
        self._lock.release()
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)


class Spilled:
    """Hidden states on disk, a file a batch: the system keeps them in memory while there is room.

    Args:
        directory: that holds them.
        device: where they are wanted.
    """

    def __init__(self, directory: Path, device: torch.device | str) -> None:
        self.directory, self.device = directory, device

    def append(self, x: Tensor, /) -> None:
        save_file({"x": x.detach().to("cpu").contiguous()}, self.directory / f"{len(self):05d}.safetensors")

    def __iter__(self) -> Iterator[Tensor]:
        return (load_file(path)["x"].to(self.device) for path in self._paths())

    def __len__(self) -> int:
        return len(self._paths())

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))

"""Checkpoints on disk: whole or not there, and known to be whole before one is trusted.

A checkpoint is a directory `step-00000200` of safetensors files and `state.json`; `manifest.json` is written last and
holds size and SHA-256 of every other file. It is built under a temporary name, each file forced to the disk, and
appears by one atomic rename that never replaces anything. After a kill at any instant a directory called `step-*` is
complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.atomic import TEMPORARY, fsync, publish, remove
from finetune.errors import RunError
from finetune.training.meter import readable

FORMAT_VERSION = 1
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})")


class InvalidCheckpoint(Exception):
    """A checkpoint that must not be used; the message says why."""


def name_of(step: int) -> str:
    """Directory name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Inverse of `name_of`; None for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def listed(directory: Path) -> list[Path]:
    """Checkpoints, valid or not, oldest first."""
    found = [(step, path) for path in directory.glob("step-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def write(directory: Path, step: int, groups: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write a checkpoint and return its path.

    Args:
        directory: made where it is missing.
        groups: file stem -> tensors by name, on any device; each becomes `<stem>.safetensors`.
        state: plain values for `state.json`.

    Raises:
        RunError: when it cannot be written, e.g. because the disk is full; earlier checkpoints are untouched.
    """
    final = directory / name_of(step)
    temporary = directory / f"{TEMPORARY}{name_of(step)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        for stem, tensors in groups.items():
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                temporary / f"{stem}.safetensors",
            )
        _write_json(temporary / STATE, {"format_version": FORMAT_VERSION, "step": step, **state})
        for path in temporary.iterdir():
            fsync(path)
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        _write_json(temporary / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})
        fsync(temporary / MANIFEST)
        if final.exists():  # only what `newest_valid` refused can be in the way
            remove(final)
        publish(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(directory if directory.exists() else directory.parent).free
        raise RunError(f"checkpoint {final} cannot be written ({readable(free)} free): {error}") from error
    return final


def check(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        InvalidCheckpoint: naming the first file that is missing or differs.
        RunError: when the checkpoint was written by a newer version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        version, files = int(manifest["format_version"]), dict(manifest["files"])
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{path.name} has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"{path.name}/{MANIFEST} cannot be read: {error!r}") from None
    if version > FORMAT_VERSION:
        raise RunError(
            f"checkpoint {path} has format_version {version}, newer than {FORMAT_VERSION}: update finetune-kit"
        )
    for name, wanted in files.items():
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            raise InvalidCheckpoint(f"{path.name}/{name} cannot be read: {error.strerror}") from None
        if found["bytes"] != wanted["bytes"]:
            raise InvalidCheckpoint(f"{path.name}/{name} has {found['bytes']} bytes, expected {wanted['bytes']}")
        if found["sha256"] != wanted["sha256"]:
            raise InvalidCheckpoint(f"{path.name}/{name} differs from its SHA-256")
    if STATE not in files:
        raise InvalidCheckpoint(f"{path.name}/{MANIFEST} does not list {STATE}")


def newest_valid(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not.

    Raises:
        RunError: when a checkpoint was written by a newer version.
    """
    skipped: list[str] = []
    for path in reversed(listed(directory)):
        try:
            check(path)
        except InvalidCheckpoint as reason:
            skipped.append(f"checkpoint skipped: {reason}")
            continue
        return path, skipped
    return None, skipped


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint that `check` has passed."""
    state: dict[str, Any] = json.loads((path / STATE).read_text("utf-8"))
    return state


def read_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """One group of tensors, on the CPU."""
    tensors: dict[str, Tensor] = load_file(path / f"{stem}.safetensors")
    return tensors


def rotate(directory: Path, keep: int, protected: Iterable[int]) -> None:
    """Delete the oldest until `keep` whole ones are left.

    Never deletes the newest whole one, nor those whose step is protected. Whole means here that every file has its
    size: hashing all of them at every save would cost more than the save.

    Raises:
        RunError: when one cannot be deleted.
    """
    spared = set(protected)
    whole = [path for path in listed(directory) if _sizes_match(path)]
    for path in whole[: -max(1, keep)]:
        if step_of(path) in spared:
            continue
        try:
            remove(path)
        except OSError as error:
            raise RunError(f"old checkpoint {path} cannot be removed: {error.strerror or error}") from error


def planned_bytes(parameter_bytes: int, state_bytes: int, keep: int) -> int:
    """Disk that the checkpoints of a run take at their peak: those kept, the best one, and the one being written."""
    margin = 1 << 20
    return (parameter_bytes + state_bytes + margin) * (keep + 2)


def _sizes_match(path: Path) -> bool:
    try:
        files = json.loads((path / MANIFEST).read_text("utf-8"))["files"]
        return all((path / name).stat().st_size == wanted["bytes"] for name, wanted in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", "utf-8")

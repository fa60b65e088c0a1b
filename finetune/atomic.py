"""Files and directories that appear whole or not at all, also after a power cut."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""Prefix of what is not finished; whoever opens a directory may delete such entries of runs that are over."""

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_SYMBOL = "renameat2"


def fsync(path: Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete directory its final name; everything in it has been fsynced by its writer.

    Raises:
        FileExistsError: when the name is taken; even by an empty directory, which a plain rename would silently
            replace.
    """
    fsync(temporary)
    _rename_no_replace(temporary, final)
    fsync(final.parent)


def remove(directory: Path) -> None:
    """Delete a directory so that nobody ever sees half of it under its own name."""
    doomed = directory.with_name(f"{TEMPORARY}doomed-{directory.name}-{os.getpid()}")
    os.rename(directory, doomed)
    shutil.rmtree(doomed)


def clean_leftovers(directory: Path) -> list[str]:
    """Delete what writers that died have left behind; returns the names."""
    names = sorted(entry.name for entry in directory.glob(f"{TEMPORARY}*"))
    for name in names:
        entry = directory / name
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return names


def _rename_no_replace(source: Path, target: Path) -> None:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), _SYMBOL, None) if os.name == "posix" else None
    if renameat2 is not None:
        arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
        if renameat2(*arguments) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(target))
    # a file system or libc without the flag: the directory is locked by this run, so looking first is enough
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)

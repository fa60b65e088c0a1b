"""The directory of a run: who may write in it, what it says about itself, and its metrics."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from finetune.atomic import TEMPORARY, clean_leftovers, fsync, write_json
from finetune.errors import RunError
from finetune.training.meter import Meter, memory_in_use, readable

FORMAT_VERSION = 1
RECORD, METRICS, LOCK = "run.json", "metrics.jsonl", ".lock"
STATUSES = ("running", "finished", "interrupted", "failed")
VERSIONED = (
    "finetune-kit",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
)


class RunDirectory:
    """A run's directory, held by one process at a time through an OS lock that dies with it.

    Use `create`, `resume` or `follow`; as a context manager it says `failed` when the block raises. On ranks other than
    0 (`follow`) everything that writes does nothing.

    Attributes:
        path: the directory.
        record: the content of run.json.
        resumed: whether it held a run before.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: FileLock | None, resumed: bool) -> None:
        self.path, self.record, self.resumed = path, record, resumed
        self._lock = lock
        self._baseline = memory_in_use()
        self._meter: Meter | None = None

    @classmethod
    def create(cls, name: str, output_dir: str | Path | None = None, *, root: str | Path = "runs") -> RunDirectory:
        """A new run in `output_dir`, else in a new `<root>/<name>/<timestamp>`.

        Raises:
            RunError: when the directory holds another run, is in use, or cannot be written.
        """
        path = Path(output_dir) if output_dir else _fresh(Path(root) / name)
        lock = _acquire(path)
        try:
            _refuse_another(path)
            clean_leftovers(path)
            record = {
                "format_version": FORMAT_VERSION,
                "name": name,
                "status": "running",
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
                "versions": versions(),
                "phases": {},
                "notes": [],
            }
            run = cls(path, record, lock, resumed=False)
            run._write()
        except BaseException:
            lock.release()
            raise
        return run

    @classmethod
    def resume(cls, path: str | Path) -> RunDirectory:
        """Open the directory of an earlier run. Its status is left as it is until `start()`.

        Raises:
            RunError: when it holds no run, is in use, cannot be written, or was written by a newer version.
        """
        path = Path(path)
        record = read_record(path)
        lock = _acquire(path)
        clean_leftovers(path)
        return cls(path, record, lock, resumed=True)

    @classmethod
    def follow(cls, path: str | Path) -> RunDirectory:
        """The view of a rank other than 0: reads, never writes."""
        return cls(Path(path), {"phases": {}, "notes": []}, None, resumed=False)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.writable and self.record["status"] == "running":
            self.update(status="failed", error=f"{kind.__name__}: {error}".splitlines()[0])
        self.close()

    @property
    def writable(self) -> bool:
        """Whether this process is the one that writes."""
        return self._lock is not None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go; not necessarily there yet."""
        return self.path / "checkpoints"

    def start(self) -> None:
        """Say that the run is running (again)."""
        self.record.pop("error", None)
        self.update(status="running")

    def update(self, **values: Any) -> None:
        """Set fields of run.json, atomically on disk.

        Raises:
            ValueError: for a status that does not exist.
        """
        if values.get("status", "running") not in STATUSES:
            raise ValueError(f"status {values['status']!r} is none of {STATUSES}")
        self.record.update(values)
        self._write()

    def note(self, line: str) -> None:
        """Keep a line that a user should read; the same line once."""
        if line not in self.record["notes"]:
            self.record["notes"].append(line)
            self._write()

    def imports_done(self) -> None:
        """Peak memory is counted above what is in use now."""
        self._baseline = memory_in_use()

    @contextmanager
    def phase(self, name: str) -> Iterator[Meter]:
        """Measure a phase: its seconds add up over resumes, its peak memory is the largest."""
        with Meter(self._baseline) as meter:
            outer, self._meter = self._meter, meter
            try:
                yield meter
            finally:
                self._meter = outer
                meter.observe()
                known = self.record["phases"].get(name, {"seconds": 0.0, "peak_memory_bytes": 0})
                self.record["phases"][name] = {
                    "seconds": round(known["seconds"] + meter.seconds, 3),
                    "peak_memory_bytes": max(known["peak_memory_bytes"], meter.peak_bytes),
                }
                self._write()

    @property
    def peak_memory_bytes(self) -> int:
        """Of the phase under way, above the imports."""
        if self._meter is None:
            return max(0, memory_in_use() - self._baseline)
        self._meter.observe()
        return self._meter.peak_bytes

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if not self.writable:
            return
        with _writing(self.path / METRICS), open(self.path / METRICS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def sync_metrics(self) -> None:
        """Force metrics.jsonl to the disk, so that a checkpoint never knows steps that the metrics do not."""
        if self.writable and (self.path / METRICS).exists():
            fsync(self.path / METRICS)

    def truncate_metrics(self, step: int) -> None:
        """Keep the lines up to a step; a last line that was cut off goes too."""
        path = self.path / METRICS
        if not self.writable or not path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        temporary = path.with_name(f"{TEMPORARY}{METRICS}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        fsync(temporary)
        os.replace(temporary, path)
        fsync(self.path)

    def close(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()

    def _write(self) -> None:
        if self.writable:
            with _writing(self.path / RECORD):
                write_json(self.path / RECORD, self.record)


def read_record(path: Path) -> dict[str, Any]:
    """run.json of a run directory.

    Raises:
        RunError: when there is none, it cannot be read, or its format is newer than this version knows.
    """
    if not path.is_dir():
        raise RunError(f"resume={path} does not exist: expected the directory of an earlier run")
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} holds no {RECORD}: expected the directory of an earlier run") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path / RECORD} cannot be read: {error}") from None
    version = record.get("format_version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise RunError(f"{path / RECORD} has format_version {version!r}: expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise RunError(
            f"{path / RECORD} has format_version {version}, newer than {FORMAT_VERSION}: update finetune-kit"
        )
    return record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, up to the first that was cut off; none where there is no file."""
    lines: list[dict[str, Any]] = []
    file = path / METRICS
    for text in file.read_text("utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def require_space(path: Path, needed: int, what: str) -> None:
    """Refuse early what would fill the disk.

    Raises:
        RunError: naming what is needed and what is free.
    """
    free = shutil.disk_usage(path).free
    if needed > free:
        raise RunError(
            f"{path} has {readable(free)} free, but {what} need about {readable(needed)}: free some space, lower "
            "train.keep_checkpoints, or choose another output_dir"
        )


def shared_run(accelerator: Any, make: Callable[[], RunDirectory]) -> RunDirectory:
    """`make()` on rank 0, a follower of the same directory elsewhere; an error of rank 0 is raised on every rank."""
    from accelerate.utils import broadcast_object_list

    run: RunDirectory | None = None
    answer: list[str | None] = [None, None]
    if accelerator.is_main_process:
        try:
            run = make()
            answer[0] = str(run.path)
        except RunError as error:
            answer[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise RunError(answer[1])
    return run or RunDirectory.follow(str(answer[0]))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say which file it was that could not be written.

    Raises:
        RunError: for a full disk and the like.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def _fresh(parent: Path) -> Path:
    """A directory named after this second that did not exist; made here, so that two runs never share one."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1000):
        path = parent / (f"{stamp}-{attempt}" if attempt else stamp)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"{path} cannot be created: {error.strerror}; set output_dir=") from None
        return path
    raise RunError(f"{parent} holds a thousand runs of {stamp}: set output_dir=")


def check_output(output_dir: str | Path) -> None:
    """What can be said against an `output_dir` before minutes go into a run; `RunDirectory.create` has the last word.

    Raises:
        RunError: when the directory holds another run, is in use, or cannot be written.
    """
    path = Path(output_dir)
    if (path / RECORD).exists():
        with _acquire(path):
            _refuse_another(path)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunError(
            f"output_dir={path} is not writable: {there} is {'closed to us' if there.is_dir() else 'a file'}"
        )


def _refuse_another(path: Path) -> None:
    """A directory that holds a run is not written over."""
    if (path / RECORD).exists():
        raise RunError(f"output_dir={path} holds another run: choose another, or continue that one with resume={path}")


def _acquire(path: Path) -> FileLock:
    """The lock of a directory, which is made where it is missing.

    Raises:
        RunError: when it cannot be made or written, or another process holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{path} is in use by another run that is still going: choose another output_dir") from None
    except OSError as error:
        raise RunError(f"output_dir={path} is not writable: {error.strerror or error}") from None
    return lock

"""Wall time and peak memory of a phase of the run."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

import torch

SAMPLE_SECONDS = 0.02


def readable(count: int) -> str:
    """Bytes for people, in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def memory_in_use() -> int:
    """Bytes in use now: on CUDA of the current device as the device itself counts them (contexts included), else the
    anonymous resident memory of this process (mapped files are not counted); 0 where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return total - free
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        return _resident_bytes()
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return _resident_bytes()


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


class Meter:
    """Measures what runs within it; peaks are sampled by a thread every 20 ms.

    Args:
        baseline: bytes that were in use before anything of the run was loaded; subtracted on the CPU. On CUDA the
            figure is the device's own and nothing is subtracted.
    """

    def __init__(self, baseline: int = 0) -> None:
        self.baseline = baseline
        self.peak = 0
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory meter", daemon=True)

    def __enter__(self) -> Meter:
        self._start = time.perf_counter()
        self.observe()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.observe()

    @property
    def seconds(self) -> float:
        """Since it was entered."""
        return time.perf_counter() - self._start

    @property
    def peak_bytes(self) -> int:
        """The largest figure seen, above the baseline."""
        on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return self.peak if on_cuda else max(0, self.peak - self.baseline)

    def observe(self) -> None:
        """Look now."""
        self.peak = max(self.peak, memory_in_use())

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.observe()

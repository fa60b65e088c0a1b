"""How far a quantization is, layer by layer, and the way to stop it between two of them."""

from __future__ import annotations

import sys
import time
from typing import Any

from finetune.quant.layer import Layer
from finetune.training.signals import StopSignals


class Stopped(Exception):
    """A signal asked for an end; what was finished is on disk.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere.

    Args:
        signals: looked at after each layer.
        before: layers that an earlier run has done.
    """

    def __init__(self, signals: StopSignals, before: int) -> None:
        self._signals, self._before = signals, before
        self._bar: Any = None
        self._task: Any = None
        self._begun = time.perf_counter()
        self._said = 0.0

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(TextColumn("quantize"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar.start()
            self._task = self._bar.add_task("")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def layer(self, layer: Layer, done: int, of: int) -> None:
        """A projection is done.

        Raises:
            Stopped: where a signal has come.
        """
        seconds = time.perf_counter() - self._begun
        left = seconds / (done - self._before) * (of - done)
        simple = "nearest" if layer.sparsity is None else "by magnitude"
        errors = f"error {layer.error:.2e} ({simple} {layer.error_rtn:.2e})"
        if self._bar is not None:
            told = f"{layer.name}: {errors}, {left:.0f} s left"
            self._bar.update(self._task, total=of, completed=done, description=told)
        elif done == of or seconds - self._said >= 2:
            self._said = seconds
            print(f"quantized {done} of {of}: {layer.name}: {errors}, {left:.0f} s left", flush=True)
        if layer.note:
            print(f"{layer.name}: {layer.note}", flush=True)
        self._stop()

    def step(self, what: str, step: int, of: int) -> None:
        """A block is being trained, or has been (`step` is `of`).

        Raises:
            Stopped: where a signal has come.
        """
        seconds = time.perf_counter() - self._begun
        if self._bar is not None and step < of:
            self._bar.update(self._task, description=f"{what}: step {step} of {of}")
        elif step == of:
            print(what, flush=True)
        elif seconds - self._said >= 2:
            self._said = seconds
            print(f"{what}: step {step} of {of}", flush=True)
        self._stop()

    def _stop(self) -> None:
        """End where a signal has come."""
        if self._signals.received is not None:
            raise Stopped(self._signals.received)

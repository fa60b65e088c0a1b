"""What a user sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from finetune.training.meter import readable


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows steps; silent on ranks other than 0.

    Args:
        total: steps of the whole run.
        done: steps done before this process began.
        enabled: whether this process prints.
    """

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        self.total, self.first, self.enabled = total, done, enabled
        self._start = time.perf_counter()
        self._away = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, completed=self.first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on steps (evaluation, checkpoints) when guessing what is left."""
        self._away += seconds

    def remaining(self, step: int) -> float:
        """Seconds that the steps still take, judged by those of this process."""
        spent = time.perf_counter() - self._start - self._away
        return spent / max(1, step - self.first) * (self.total - step)

    def step(self, step: int) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if "eval_loss" in line:
            measured = {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_")}
            shown = "  ".join(f"{key} {value:.4f}" for key, value in measured.items() if value is not None)
            self.say(f"step {line['step']}/{self.total}  held-out {shown}")
            return
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = (
            f"loss {loss}  {line['tokens_per_second']:.0f} tokens/s  {readable(line['peak_memory_bytes'])}  "
            f"{clock(self.remaining(line['step']))} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        elif self.enabled:
            print(f"step {line['step']}/{self.total}  {text}", flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.enabled:
            print(text, flush=True)

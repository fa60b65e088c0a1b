"""The seams of the training room: objective, tracker, result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from finetune.data.rows import Batch


class Objective(Protocol):
    """A loss as a sum, so that accumulation, packing and data parallelism normalize exactly.

    Attributes:
        note: a line that the user should read, e.g. on what could not be computed the cheap way; None for none.
    """

    note: str | None

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss over the learnt positions (float32 scalar with a graph) and their number."""
        ...


class Tracker(Protocol):
    """Receives what a run reports. A tracker that fails never stops a run: it says so once and goes quiet.

    Attributes:
        run_id: the tracker's own name of the run, None where it has none.
        note: where the run can be seen; None where there is nothing to say.
    """

    run_id: str | None
    note: str | None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """One metrics line."""
        ...

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Text in rows, e.g. samples before and after."""
        ...

    def summary(self, values: dict[str, Any]) -> None:
        """Final figures, e.g. the proofs."""
        ...

    def artifact(self, directory: Path, name: str) -> None:
        """Upload a directory, where the user asked for it."""
        ...

    def finish(self, exit_code: int) -> None:
        """The run is over."""
        ...


@dataclass
class TrainResult:
    """What the loop hands back.

    Attributes:
        status: finished | interrupted | stopped_early.
        steps, epochs: done in all, resumed ones included.
        first_eval, last_eval, best_eval: held-out loss in nats per token, or in the unit of an objective over rows;
            None where nothing was evaluated.
        first_metrics, best_metrics: what such an objective measured beside `first_eval` and `best_eval`.
        best_step: the step whose weights the model holds where they were the best and not the last ones; else None.
        signal: number of the signal that interrupted the run; None where none did.
        skipped_steps: steps left out because their loss or gradient was not finite.
        notes: lines a user should read, e.g. a substituted optimizer.
    """

    status: str
    steps: int
    epochs: float
    first_eval: float | None = None
    last_eval: float | None = None
    best_eval: float | None = None
    first_metrics: dict[str, float | None] = field(default_factory=dict)
    best_metrics: dict[str, float | None] = field(default_factory=dict)
    best_step: int | None = None
    signal: int | None = None
    skipped_steps: int = 0
    notes: list[str] = field(default_factory=list)

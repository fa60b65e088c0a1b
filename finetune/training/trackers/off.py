"""No tracking besides metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.training.config import TRACKERS, TrackingConfig
from finetune.training.run_directory import RunDirectory


@dataclass
class OffConfig(TrackingConfig):
    """Metrics go to metrics.jsonl alone."""

    name: str = "off"


class Off:
    """Takes everything and keeps nothing."""

    run_id: str | None = None
    note: str | None = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Nothing."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Nothing."""

    def summary(self, values: dict[str, Any]) -> None:
        """Nothing."""

    def artifact(self, directory: Path, name: str) -> None:
        """Nothing."""

    def finish(self, exit_code: int) -> None:
        """Nothing."""


@TRACKERS.register(OffConfig)
def build(config: OffConfig, run: RunDirectory) -> Off:
    """The tracker that does nothing."""
    return Off()

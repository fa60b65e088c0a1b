"""What became of the data, for the terminal and run.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class SideReport:
    """One side, `data.train` or `data.eval`.

    Attributes:
        rows: read, faulty ones included.
        examples: made of them; more where an answer was a list.
        faulty, faults: skipped rows, and `file:line: reason` of the first few.
        too_long: longer than max_length.
        formats: source -> format, as recognised.
        straddling: rows in which a token spans the border of prompt and answer.
    """

    rows: int = 0
    examples: int = 0
    faulty: int = 0
    faults: list[str] = field(default_factory=list)
    too_long: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    straddling: int = 0


@dataclass
class DataReport:
    """Both sides and what was made of them. Token counts are of one epoch.

    Attributes:
        template: which chat template, in words; empty where none was used.
        max_length, policy: tokens a row, and `data.too_long`.
        train_rows, train_tokens, train_learnt: to learn from; `learnt` counts positions with a label.
        eval_rows, eval_tokens, eval_learnt: held out.
        held_out: the held-out rows were taken from train.
        labels: of the rows to learn from, in words, where rows have one in place of an answer.
        shared: held-out rows that are also learnt (only possible where data.eval was given).
        notes: anything else a user should read.
        cached: nothing was tokenized: all was in the cache.
    """

    train: SideReport
    eval: SideReport | None
    template: str
    max_length: int
    policy: str
    train_rows: int = 0
    train_tokens: int = 0
    train_learnt: int = 0
    eval_rows: int = 0
    eval_tokens: int = 0
    eval_learnt: int = 0
    held_out: bool = False
    labels: str = ""
    shared: int = 0
    notes: list[str] = field(default_factory=list)
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """The inverse of `to_dict`."""
        sides = {key: SideReport(**values[key]) if values[key] else None for key in ("train", "eval")}
        return cls(**{**values, **sides})

    def lines(self) -> list[str]:
        """For a person: what was read, skipped, cut, and what is learnt."""
        lines = [f"data: {self._side('data.train', self.train)}"]
        if self.eval:
            lines.append(f"data: {self._side('data.eval', self.eval)}")
        if self.template:
            lines.append(f"data: chat template: {self.template}")
        for key, side in (("data.train", self.train), ("data.eval", self.eval)):
            if side and side.faulty:
                lines.append(f"data: {key}: {side.faulty} faulty rows skipped: {'; '.join(side.faults)}")
            if side and side.too_long:
                done = {"truncate": "truncated", "drop": "dropped", "split": "split"}.get(self.policy, self.policy)
                lines.append(f"data: {key}: {side.too_long} rows longer than {self.max_length} tokens {done}")
        held = " held out of data.train by a hash of the prompt" if self.held_out else " for evaluation"
        learnt = f"labels: {self.labels}" if self.labels else f"{self.train_learnt} of them learnt"
        held += ", from the cache" if self.cached else ""
        lines.append(
            f"data: {self.train_rows} rows to learn from ({self.train_tokens} tokens, {learnt}), "
            f"{self.eval_rows} rows{held}"
        )
        return lines + [f"data: {note}" for note in self._notes()]

    def _notes(self) -> list[str]:
        notes = list(self.notes)
        if self.shared:
            notes.append(f"{self.shared} of the rows for evaluation are also learnt from: their loss says little")
        if self.train.straddling:
            notes.append(
                f"in {self.train.straddling} rows one token spans the end of the prompt and the start of the answer: "
                "it is learnt, but a prompt alone never ends with it"
            )
        return notes

    @staticmethod
    def _side(key: str, side: SideReport) -> str:
        formats = ", ".join(f"{source} ({form})" for source, form in side.formats.items())
        more = f" giving {side.examples} examples" if side.examples > side.rows - side.faulty else ""
        return f"{key}: {side.rows} rows{more} of {formats}"

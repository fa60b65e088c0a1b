"""Which rows make up each optimizer step: a pure function of (seed, epoch) and of a cursor.

A *window* is what one step learns from: `grad_accumulation` micro-batches on each process. Every process knows the
whole plan, so the tokens of a window are counted without asking anybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from finetune.data.batching import batch_plan
from finetune.data.rows import IGNORE, TokenRows
from finetune.errors import DataError
from finetune.training.config import TrainConfig
from finetune.training.separation import MicroBatch


@dataclass(frozen=True)
class Window:
    """One optimizer step's rows.

    Attributes:
        mine: this process's micro-batches; may be empty in the last window of an epoch.
        tokens: real tokens of all processes.
        learnt: learnt tokens of all processes.
        epoch, cursor: where the next window starts; the cursor counts micro-batches of all processes.
        progress: epochs done after it, as a fraction.
    """

    mine: list[MicroBatch]
    tokens: int
    learnt: int
    epoch: int
    cursor: int
    progress: float


class Plan:
    """The windows of a run, for one process.

    Args:
        rows: the training rows.
        config: batch size, accumulation, epochs and steps.
        packing, max_length: as `finetune.data.batching.batch_plan` takes them.
        seed: decides the order together with the epoch.
        world, rank: processes, and which this one is.
    """

    def __init__(
        self, rows: TokenRows, config: TrainConfig, *, packing: bool, max_length: int, seed: int, world: int, rank: int
    ) -> None:
        self.rows, self.config, self.world, self.rank = rows, config, world, rank
        self._lengths, self._learnt = rows.lengths(), learnt_per_row(rows)
        self._batches = lru_cache(maxsize=1)(
            lambda epoch: batch_plan(
                rows, batch_size=config.batch_size, packing=packing, max_length=max_length, seed=seed, epoch=epoch
            )
        )
        self._packing = packing
        self.stride = config.grad_accumulation * world

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, at least 1."""
        if self.config.max_steps is not None:
            return self.config.max_steps
        whole, part = divmod(self.config.epochs, 1)
        if not self._packing:  # every epoch has as many micro-batches
            return max(1, round(self.config.epochs * self._steps(0)))
        steps = sum(self._steps(epoch) for epoch in range(int(whole)))
        return max(1, steps + (round(part * self._steps(int(whole))) if part else 0))

    def windows(self, epoch: int, cursor: int) -> Iterator[Window]:
        """Windows without end, from a position.

        Raises:
            DataError: where there are no rows.
        """
        while True:
            batches = self._batches(epoch)
            if not batches:
                raise DataError("no training rows are left: nothing can be learnt from an empty set")
            if cursor >= len(batches):
                epoch, cursor = epoch + 1, 0
                continue
            window = batches[cursor : cursor + self.stride]
            cursor += len(window)
            members = [row for batch in window for sequence in batch for row in sequence]
            yield Window(
                mine=window[self.rank :: self.world],
                tokens=int(self._lengths[members].sum()),
                learnt=int(self._learnt[members].sum()),
                epoch=epoch,
                cursor=cursor,
                progress=epoch + cursor / len(batches),
            )

    def _steps(self, epoch: int) -> int:
        return -(-len(self._batches(epoch)) // self.stride)


def learnt_per_row(rows: TokenRows) -> np.ndarray:
    """int64 [rows]: what is learnt of each row: one where it has a target of its own, else its labelled tokens without
    the first one, which nothing predicts."""
    if rows.targets is not None:
        return np.ones(len(rows), np.int64)
    flags = rows.labels != IGNORE
    starts, ends = rows.offsets[:-1], rows.offsets[1:]
    flags[starts[starts < ends]] = False
    running = np.concatenate([[0], np.cumsum(flags)])
    counts: np.ndarray = running[ends] - running[starts]
    return counts

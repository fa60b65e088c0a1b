"""The training loop: one for every adapter, objective and device.

It runs on `accelerate` for processes and devices, and normalises, clips and reduces gradients itself, so that
accumulation, packing and data parallelism all compute the same step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from finetune.adapters.base import Learner
from finetune.adapters.rates import whole_scales
from finetune.data.rows import TokenRows
from finetune.errors import RunError
from finetune.training import checkpoint, state
from finetune.training.config import OPTIMIZERS, OptimConfig, TrainConfig
from finetune.training.group import Group
from finetune.training.head_rate import head_scales
from finetune.training.held_out import HeldOut, seed_processes
from finetune.training.mode import training_mode
from finetune.training.optimizers.parameter_groups import grouped
from finetune.training.progress import Progress
from finetune.training.protocols import Objective, Tracker, TrainResult
from finetune.training.run_directory import RunDirectory, require_space
from finetune.training.schedule import learning_rate, peak
from finetune.training.separation import batch_maker
from finetune.training.signals import StopSignals
from finetune.training.state import Live, LoopState
from finetune.training.step import Stepper, StepResult
from finetune.training.window import Plan, Window

FIRST_ROWS = 8
"""Rows that are looked at to see what a head is given."""
LOSS_SCALE = 2.0**12
"""Where fp16's loss scale starts. torch's own 2^16 overflows on most models, and each halving costs a step."""


def train(
    model: nn.Module,
    adapter: Learner,
    rows: TokenRows,
    eval_rows: TokenRows,
    *,
    objective: Objective,
    config: TrainConfig,
    optim: OptimConfig,
    run: RunDirectory,
    tracker: Tracker,
    accelerator: Any,
    pad_id: int,
    packing: bool,
    max_length: int,
    seed: int,
) -> TrainResult:
    """Train what the adapter names until the steps are done, a signal asks to stop, or early stopping does.

    Where `run` already holds a valid checkpoint, training goes on from the newest one, bit for bit. At the end the
    model holds the last weights, or, where held-out loss was measured along the way and was better before, the best
    ones.

    Args:
        model: with the adapter attached, on the accelerator's device.
        rows, eval_rows: tokenized; `eval_rows` may be empty.
        objective: built for this model.
        run: an open run directory; its phase `train` is measured here.
        pad_id: token that fills batches up.
        packing, max_length: as `finetune.data.batching.batch_plan` takes them.
        seed: decides data order and dropout.

    Raises:
        RunError: the disk cannot hold the checkpoints, a checkpoint cannot be written, the resumed one does not fit,
            the loss stays non-finite, or another process failed.
    """
    group = Group(accelerator)
    config = replace(config, learning_rate=peak(config, adapter))
    parameters = adapter.trainable()
    group.broadcast(parameters.values())
    batches, masked = batch_maker(model, rows, packing=packing, pad_id=pad_id, device=group.device)
    first = batches([[row] for row in range(min(len(rows), FIRST_ROWS))])
    scales = whole_scales(adapter) | adapter.learning_rate_scales() | head_scales(config, adapter, first)
    learning = grouped(parameters, scales)
    optimizer, note = OPTIMIZERS.build(optim, learning, config, group.device)
    scaler = torch.amp.GradScaler(group.device.type, init_scale=LOSS_SCALE, enabled=config.dtype == "fp16")
    live = Live(parameters, optimizer, scaler, group)
    seed_processes(seed, group)
    plan = Plan(rows, config, packing=packing, max_length=max_length, seed=seed, world=group.world, rank=group.rank)
    held_out = HeldOut(model, eval_rows, objective, group, batch_size=config.batch_size, pad_id=pad_id)
    stepper = Stepper(batches, objective, live, max_grad_norm=config.max_grad_norm)
    loop = _Loop(config, run, tracker, live, plan, stepper, held_out)
    for line in (note, objective.note, masked):
        if line:
            loop.note(line)
    if group.main and tracker.note:
        print(tracker.note, flush=True)
    with run.phase("train"), training_mode(model, config.gradient_checkpointing), StopSignals() as signals:
        return loop.run(signals)


class _Loop:
    """The run of one process, from its newest checkpoint to its end."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        tracker: Tracker,
        live: Live,
        plan: Plan,
        stepper: Stepper,
        held_out: HeldOut,
    ) -> None:
        self.config, self.directory, self.tracker, self.live = config, run, tracker, live
        self.plan, self.stepper, self.held_out = plan, stepper, held_out
        self.state = LoopState()
        self.total = plan.total_steps()
        self.notes: list[str] = []
        self._saved_step = -1
        self._log_start = (time.perf_counter(), 0)

    def note(self, line: str) -> None:
        """Tell the user now, in run.json and in the result."""
        self.notes.append(line)
        if self.live.group.main:
            print(line, flush=True)
            self.directory.note(line)

    def run(self, signals: StopSignals) -> TrainResult:
        """Train to the end."""
        self._resume()
        self._check_space()
        self.state.tracker_id = self.tracker.run_id
        stop = False
        with Progress(self.total, self.state.step, self.live.group.main) as progress:
            self._log_start = (time.perf_counter(), self.state.tokens)
            self._evaluate_if_due(progress, signals)
            windows = self.plan.windows(self.state.epoch, self.state.cursor)
            while self.state.step < self.total and not self._stops_early():
                stop = self._interrupted(signals)
                if stop:
                    break
                stop = self._step(next(windows), progress, signals)
                self._evaluate_if_due(progress, signals)
                if self._save_is_due():
                    self._save(progress)
                if stop:
                    break
            stop = stop or self._interrupted(signals)
            if self.state.step != self._saved_step and (self.state.step or stop):
                self._save(progress)
        return self._result(signals, stop)

    def _resume(self) -> None:
        """From the newest valid checkpoint, where there is one."""
        newest, skipped = checkpoint.newest_valid(self.directory.checkpoints)
        for line in skipped:
            self.note(line)
        if newest is not None:
            self.state, notes = state.restore(newest, self.live)
            self._saved_step = self.state.step
            self.note(f"resumed from {newest.name}")
            for line in notes:
                self.note(line)
        self.directory.truncate_metrics(self.state.step if newest is not None else -1)

    def _check_space(self) -> None:
        parameters = self.live.parameters.values()
        held = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        moments = 2 * 4 * sum(parameter.numel() for parameter in parameters)
        saves = 1 + sum(self.total // every for every in (self.config.save_every, self.config.eval_every) if every)
        needed = checkpoint.planned_bytes(held, moments, min(self.config.keep_checkpoints, saves))
        with self.live.group.together():
            if self.live.group.main:
                require_space(self.directory.path, needed, "the checkpoints of this run")

    def _interrupted(self, signals: StopSignals) -> bool:
        """Whether any process was asked to stop."""
        return self.live.group.sum([float(signals.received is not None)])[0] > 0

    def _step(self, window: Window, progress: Progress, signals: StopSignals) -> bool:
        """One optimizer step and its log line; whether any process was asked to stop."""
        rate = learning_rate(self.state.step, self.total, self.config)
        result = self.stepper.take(window, rate, signals.received is not None)
        now = self.state
        now.step += 1
        now.epoch, now.cursor, now.progress = window.epoch, window.cursor, window.progress
        now.tokens += window.tokens
        if result.fault is None:
            now.loss_sum += result.loss_sum
            now.loss_tokens += result.learnt
            now.skipped_in_a_row = 0
        else:
            self._skipped(result, progress)
        progress.step(now.step)
        if now.step % self.config.log_every == 0 or now.step == self.total:
            self._log(result, rate, progress)
        return result.stop

    def _skipped(self, result: StepResult, progress: Progress) -> None:
        """Count a step that was left out; too many in a row end the run, with the weights before them saved."""
        now = self.state
        now.skipped_steps += 1
        if result.rescaled:
            return
        progress.say(f"step {now.step} is left out: {result.fault}")
        now.skipped_in_a_row += 1
        if now.skipped_in_a_row < self.config.max_nonfinite:
            return
        count, now.skipped_in_a_row = now.skipped_in_a_row, 0
        path = state.save(self.directory.checkpoints, now, self.live, keep=self.config.keep_checkpoints)
        raise RunError(
            f"training stopped at step {now.step}: {result.fault}, for {count} steps in a row; the weights before them "
            f"are in {path}; lower train.learning_rate ({self.config.learning_rate}) or use train.dtype=fp32"
        )

    def _log(self, result: StepResult, rate: float, progress: Progress) -> None:
        now = self.state
        moment = time.perf_counter()
        start, tokens = self._log_start
        line: dict[str, Any] = {
            "step": now.step,
            "epoch": round(now.progress, 6),
            "loss": now.loss_sum / now.loss_tokens if now.loss_tokens else None,
            "learning_rate": rate,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "tokens": now.tokens,
            "tokens_per_second": round((now.tokens - tokens) / max(1e-9, moment - start), 1),
            "peak_memory_bytes": self.directory.peak_memory_bytes,
        }
        if now.skipped_steps:
            line["skipped_steps"] = now.skipped_steps
        now.loss_sum, now.loss_tokens = 0.0, 0
        self._log_start = (moment, now.tokens)
        self._report(line, progress)

    def _report(self, line: dict[str, Any], progress: Progress) -> None:
        if self.live.group.main:
            progress.metrics(line)
            self.directory.append_metrics(line)
            self.tracker.log(line, line["step"])

    def _evaluate_if_due(self, progress: Progress, signals: StopSignals) -> None:
        """Before the first step, every `eval_every`, and after the last."""
        now, every = self.state, self.config.eval_every
        due = now.step in (0, self.total) or (every is not None and now.step % every == 0)
        if not due or now.evaluated_step == now.step:
            return
        with self._aside(progress):
            loss = self.held_out.loss(signals)
        if loss is None:
            return
        metrics = self.held_out.metrics
        now.last_eval, now.evaluated_step = loss, now.step
        if now.step == 0:
            now.first_eval, now.first_metrics = loss, metrics
        elif now.best_eval is None or loss < now.best_eval:
            now.best_eval, now.best_step, now.evals_without_best = loss, now.step, 0
            now.best_metrics = metrics
        else:
            now.evals_without_best += 1
        line = {"step": now.step, "epoch": round(now.progress, 6), "eval_loss": loss}
        self._report({**line, **{f"eval_{name}": value for name, value in metrics.items()}}, progress)

    def _stops_early(self) -> bool:
        patience = self.config.early_stopping
        return patience is not None and self.state.evals_without_best >= patience

    def _save_is_due(self) -> bool:
        """Every `save_every`, and whenever the held-out loss is the best so far."""
        step, every = self.state.step, self.config.save_every
        return step == self.state.best_step or (every is not None and step % every == 0)

    def _save(self, progress: Progress) -> None:
        with self._aside(progress):
            self.directory.sync_metrics()
            state.save(self.directory.checkpoints, self.state, self.live, keep=self.config.keep_checkpoints)
        self._saved_step = self.state.step

    @contextmanager
    def _aside(self, progress: Progress) -> Iterator[None]:
        """Time that counts neither for tokens per second nor for the time left."""
        start = time.perf_counter()
        yield
        away = time.perf_counter() - start
        progress.pause(away)
        self._log_start = (self._log_start[0] + away, self._log_start[1])

    def _result(self, signals: StopSignals, stop: bool) -> TrainResult:
        now = self.state
        status = "interrupted" if stop else "stopped_early" if now.step < self.total else "finished"
        best = None if stop else self._restore_best()
        if now.best_eval is not None and now.best_step > 0:
            self.directory.update(best={"step": now.best_step, "eval_loss": now.best_eval})
        return TrainResult(
            status=status,
            steps=now.step,
            epochs=now.progress,
            first_eval=now.first_eval,
            last_eval=now.last_eval,
            best_eval=now.best_eval,
            first_metrics=now.first_metrics,
            best_metrics=now.best_metrics,
            best_step=best,
            signal=signals.received,
            skipped_steps=now.skipped_steps,
            notes=self.notes,
        )

    def _restore_best(self) -> int | None:
        """Put the best weights into the model where they are not the last ones; their step."""
        now = self.state
        if now.best_step in (-1, now.step):
            return None
        path = self.directory.checkpoints / checkpoint.name_of(now.best_step)
        try:
            checkpoint.check(path)
        except checkpoint.InvalidCheckpoint as reason:
            self.note(f"the last weights are kept, because the best ones cannot be read: {reason}")
            return None
        state.restore_parameters(path, self.live.parameters)
        self.note(f"the weights of step {now.best_step} are kept: their held-out loss was {now.best_eval:.4f}")
        return now.best_step

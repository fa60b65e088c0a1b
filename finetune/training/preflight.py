"""The checks of the first seconds: faults that would otherwise show after hours, or never.

Everything is tried on the model itself and undone: weights, random state and mode are afterwards what they were, bit
for bit, and no optimizer exists yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.adapters.base import Adapter
from finetune.data.batching import collate
from finetune.data.rows import IGNORE, Batch, Row, TokenRows
from finetune.errors import RunError
from finetune.training.config import TrainConfig
from finetune.training.mode import training_mode
from finetune.training.protocols import Objective
from finetune.training.separation import needs_mask
from finetune.training.window import learnt_per_row

PROBE_ROWS, PROBE_STEP = 4, 1e-3
COARSE_STEP = 2.0**-6
"""A step that 16 bits can tell from none beside a one: what (IA)^3 and norms train are factors near one."""
SHOWN = 240
"""Characters of the sample row that are shown."""


def preflight(
    model: nn.Module,
    adapter: Adapter,
    rows: TokenRows,
    *,
    objective: Objective,
    tokenizer: Any,
    config: TrainConfig,
    accelerator: Any,
    pad_id: int,
    packing: bool,
) -> list[str]:
    """Try what training relies on; returns a line for each thing that was seen to work.

    Args:
        model: with the adapter attached, on the accelerator's device.
        rows: the training rows.
        tokenizer: for the sample that is shown and the EOS token.
        packing: whether rows will share sequences.

    Raises:
        RunError: one line that names each failure and its cause.
    """
    lines: list[str] = []
    failures: list[str] = []
    learnt = learnt_per_row(rows)
    if rows.targets is not None:
        lines += _targets(rows, tokenizer)
    else:
        if not learnt.sum():
            raise RunError(
                f"preflight: no token of the {len(rows)} training rows is learnt: every label is masked, check the "
                "columns and the chat template"
            )
        lines += _labels(rows, learnt, tokenizer)
        lines += _end(rows, tokenizer, failures)
    batch = _probe_batch(rows, learnt, pad_id).to(accelerator.device)
    with _untouched(adapter, accelerator.device):
        if packing:
            how = "an explicit mask" if needs_mask(model, rows, pad_id, accelerator.device) else "their positions"
            lines.append(f"packed rows stay apart by {how}, as if each were alone")
        with training_mode(model, config.gradient_checkpointing):
            lines += _gradients(adapter, objective, batch, 1024.0 if config.dtype == "fp16" else 1.0, failures)
        lines += _difference(model, adapter, batch, failures)
    if failures:
        raise RunError("preflight: " + "; ".join(failures))
    return lines


def _labels(rows: TokenRows, learnt: np.ndarray, tokenizer: Any) -> list[str]:
    """How much is learnt, and one row with its mask."""
    total = int(rows.lengths().sum())
    share = 100 * learnt.sum() / max(1, total)
    row = rows[int(np.argmax(learnt > 0))]
    pieces = "".join(
        f"[{text}]" if labelled else text
        for labelled, text in ((kept, tokenizer.decode(ids).replace("\n", "\\n")) for kept, ids in _spans(row))
    )
    if len(pieces) > SHOWN:
        pieces = f"{pieces[: SHOWN // 2]} ... {pieces[-SHOWN // 2 :]}"
    return [f"{learnt.sum()} of {total} tokens are learnt ({share:.0f} %), e.g. what stands in brackets: {pieces}"]


def _targets(rows: TokenRows, tokenizer: Any) -> list[str]:
    """One row as the model reads it, and what is learnt of it."""
    row = rows[0]
    text = tokenizer.decode(row.input_ids.tolist()).replace("\n", "\\n")
    shown = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
    return [f"a label is learnt of each of {len(rows)} rows, e.g. {row.target} of: {shown}"]


def _spans(row: Row) -> Iterator[tuple[bool, list[int]]]:
    """Runs of labelled and of masked tokens."""
    labelled = row.labels != IGNORE
    borders = [0, *(np.flatnonzero(np.diff(labelled)) + 1).tolist(), len(labelled)]
    for start, stop in itertools.pairwise(borders):
        yield bool(labelled[start]), row.input_ids[start:stop].tolist()


def _end(rows: TokenRows, tokenizer: Any, failures: list[str]) -> list[str]:
    """Whether the model learns to stop."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        return ["the tokenizer has no EOS token: the model does not learn to stop"]
    ends = rows.offsets[1:][rows.lengths() > 0] - 1
    count = int((rows.labels[ends] == eos).sum())
    if not count:
        where = "masked" if int((rows.input_ids[ends] == eos).sum()) else "missing"
        failures.append(f"no row learns to stop: the EOS token {tokenizer.eos_token!r} at their ends is {where}")
    return [f"{count} of {len(rows)} rows end in a learnt {tokenizer.eos_token}"]


def _probe_batch(rows: TokenRows, learnt: np.ndarray, pad_id: int) -> Batch:
    """A few short rows that something is learnt from."""
    usable = np.flatnonzero(learnt > 0)[:256]
    shortest = usable[np.argsort(rows.lengths()[usable], kind="stable")][:PROBE_ROWS]
    return collate(rows, [[int(index)] for index in shortest], pad_id)


@contextmanager
def _untouched(adapter: Adapter, device: torch.device) -> Iterator[None]:
    """Give trained tensors, gradients and random state back as they were."""
    before = {name: parameter.detach().clone() for name, parameter in adapter.trainable().items()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in adapter.trainable().items():
                    parameter.copy_(before[name])
                    parameter.grad = None


def _gradients(adapter: Adapter, objective: Objective, batch: Batch, scale: float, failures: list[str]) -> list[str]:
    """Each trained tensor gets a finite, nonzero gradient, at the latest after a first step.

    The second look is needed: LoRA's A has no gradient as long as its B is zero.
    """
    trained = adapter.trainable()
    if not trained:
        failures.append("nothing trains: the adapter names no tensor")
        return []
    first = _gradients_of(trained, objective, batch, scale)
    if first is None:
        failures.append("the loss does not depend on any trained tensor, or is not finite")
        return []
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.add_(first[name].sign(), alpha=PROBE_STEP)
    second = _gradients_of(trained, objective, batch, scale) or first
    wild = [name for name in trained if not bool(first[name].isfinite().all() and second[name].isfinite().all())]
    starved = [name for name in trained if not bool(first[name].any() or second[name].any())]
    for names, fault in (
        (wild, "a gradient that is not finite"),
        (starved, "no gradient, because nothing that they compute reaches the loss"),
    ):
        if names:
            failures.append(f"{len(names)} of {len(trained)} trained tensors get {fault}, first {names[0]}")
    return [f"{len(trained)} of {len(trained)} trained tensors get a finite gradient"]


def _gradients_of(
    trained: dict[str, nn.Parameter], objective: Objective, batch: Batch, scale: float
) -> dict[str, Tensor] | None:
    """Gradients by name, zeros where there is none; None where the loss has no graph or is not finite."""
    for parameter in trained.values():
        parameter.grad = None
    loss, count = objective.loss_sum(batch)
    if not loss.requires_grad or not bool(loss.isfinite()):
        return None
    (loss * (scale / max(1, count))).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def _difference(model: nn.Module, adapter: Adapter, batch: Batch, failures: list[str]) -> list[str]:
    """After the probing step, or a coarse one, the adapted model says something else than the base."""
    model.eval()
    difference = _moved(model, adapter, batch)
    if not difference > 0:
        with torch.no_grad():
            for parameter in adapter.trainable().values():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=COARSE_STEP)
        difference = _moved(model, adapter, batch)
    if not difference > 0:
        failures.append("the adapter changes nothing: after a step the logits with it are those without it")
    return [f"after one step the adapter moves the logits by up to {difference:.2g}"]


@torch.no_grad()
def _moved(model: nn.Module, adapter: Adapter, batch: Batch) -> float:
    """By how much the adapter changes a logit at most."""
    adapted = model(**batch.model_inputs()).logits
    with adapter.disabled():
        base = model(**batch.model_inputs()).logits
    return float((adapted.float() - base.float()).abs().max())

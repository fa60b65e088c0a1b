"""Do rows that share a packed sequence stay apart in this model? Found by trying, never assumed.

transformers separates rows by positions that restart, but not every model listens to them (OPT builds its own); those
get an explicit 4-D mask. Two questions decide: does another first row change what the model says in the second one (a
leak changes it, whatever the dtype), and is it what the model says of the second row alone (wrong positions are not).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.batching import LENGTH_STEP, collate, packed_mask
from finetune.data.rows import Batch, Row, TokenRows
from finetune.errors import RunError
from finetune.quant.base import FrozenWeight
from finetune.structure import inspect

MicroBatch = list[list[int]]
"""Sequences, each a list of row indices: one row unless packed."""

LONGEST = 24
"""Tokens of each probe row."""


def with_mask(batch: Batch, model: nn.Module) -> Batch:
    """A packed batch whose rows are kept apart by an explicit mask; any other batch as it is."""
    if batch.attention_mask_BS is not None:
        return batch
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return replace(batch, attention_mask_BS=packed_mask(batch, embedding.weight.dtype))


def needs_mask(model: nn.Module, rows: TokenRows, pad_id: int, device: torch.device) -> bool:
    """Whether packed rows need an explicit mask to stay apart in this model. Leaves mode and random state alone.

    Raises:
        RunError: where they do not even then.
    """
    first, second = _probe_rows(rows)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, FrozenWeight):  # what it lets rows share is no leak of the model's
                    stack.enter_context(module.uncoupled())
            leak, difference = _mixing(model, first, second, pad_id, device, masked=False)
            if leak <= 0.5 and difference <= 8:
                return False
            # Experts regroup their products. Anywhere else so much would be a leak.
            rounded = leak <= 16 and difference <= 8 and _has_experts(model)
            with suppress(IndexError, RuntimeError, TypeError, ValueError):  # a model that cannot take such a mask
                leak, difference = _mixing(model, first, second, pad_id, device, masked=True)
                if leak <= 16 and difference <= 32:
                    return True
            if rounded:  # a mask that would bring certainty overrides the model's sliding window
                return False
    finally:
        model.train(training)
    raise RunError(
        f"data.packing=true, but {type(model).__name__} mixes the rows of a packed sequence: set it to false"
    )


def _has_experts(model: nn.Module) -> bool:
    """Whether tokens are sent to experts in groups."""
    return any(p.kind == "experts" for p in inspect(model).projections)


def batch_maker(
    model: nn.Module, rows: TokenRows, *, packing: bool, pad_id: int, device: torch.device
) -> tuple[Callable[[MicroBatch], Batch], str | None]:
    """What makes a micro-batch on the device, and a line for the user where packed rows need a mask."""
    if packing and needs_mask(model, rows, pad_id, device):
        note = f"{type(model).__name__} does not tell packed rows apart by their positions: an explicit mask does"
        return lambda micro: with_mask(collate(rows, micro, pad_id, LENGTH_STEP).to(device), model), note
    return lambda micro: collate(rows, micro, pad_id, LENGTH_STEP).to(device), None


def _probe_rows(rows: TokenRows) -> tuple[Row, Row]:
    """Two short rows that differ in every place where that is possible."""
    longest = rows[int(np.argmax(rows.lengths()))]
    ids = longest.input_ids[:LONGEST]
    first = Row(ids[::-1].copy(), ids[::-1].copy())
    return first, Row(ids.copy(), ids.copy())


def _mixing(
    model: nn.Module, first: Row, second: Row, pad_id: int, device: torch.device, *, masked: bool
) -> tuple[float, float]:
    """How far the second row's logits move when the first row changes, and how far they are from those of the row
    alone.

    Both in units of the dtype's epsilon times the largest logit. The first is exactly 0 where nothing leaks: the same
    kernel on the same shapes gives the same bits (only mixtures of experts may regroup their products). The second is
    rounding, because another shape may take another kernel; float32 gets a floor of 1e-4.
    """
    other = Row(np.roll(first.input_ids, 1), first.labels)
    packed, changed = (_second(model, [row, second], pad_id, device, masked) for row in (first, other))
    alone = _second(model, [second], pad_id, device, masked)
    size = float(alone.abs().max()) or 1.0
    eps = torch.finfo(alone.dtype).eps
    leak = float((packed - changed).abs().max()) / size
    difference = float((packed - alone).abs().max()) / size
    return leak / eps, difference / max(eps, 1e-4 / 8)


def _second(model: nn.Module, rows: list[Row], pad_id: int, device: torch.device, masked: bool) -> Tensor:
    """The logits [S, V] of the last of some rows packed into one sequence."""
    batch = collate(TokenRows.of(rows), [list(range(len(rows)))], pad_id).to(device)
    if masked:
        batch = with_mask(batch, model)
    logits: Tensor = model(**batch.model_inputs()).logits[0, -len(rows[-1].input_ids) :]
    return logits

"""One optimizer step: forward and backward over a window, normalised over all its learnt tokens, clipped, applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data.rows import Batch
from finetune.training.optimizers.parameter_groups import SCALE
from finetune.training.protocols import Objective
from finetune.training.separation import MicroBatch
from finetune.training.state import Live
from finetune.training.window import Window


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss_sum, learnt: over all processes; nats and tokens.
        grad_norm: L2 norm over all trained tensors, before clipping.
        fault: why the step was left out, None where it was taken.
        rescaled: left out only because fp16's loss scale was too high, and lowered; no sign of trouble.
        stop: whether any process was asked to stop.
    """

    loss_sum: float
    learnt: int
    grad_norm: float
    fault: str | None
    rescaled: bool
    stop: bool


class Stepper:
    """Takes steps.

    The loss of a window is the sum over its learnt tokens divided by their number, over all micro-batches and processes
    together: N micro-batches equal one big batch, and ragged windows are exact.

    Args:
        batches: makes a micro-batch on the device.
        max_grad_norm: gradients are scaled down to it; None never.
    """

    def __init__(
        self,
        batches: Callable[[MicroBatch], Batch],
        objective: Objective,
        live: Live,
        *,
        max_grad_norm: float | None,
    ) -> None:
        self.batches, self.objective, self.live = batches, objective, live
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self._parameters: Sequence[nn.Parameter] = list(live.parameters.values())

    def take(self, window: Window, learning_rate: float, stop: bool) -> StepResult:
        """Learn from a window; where something is not finite, all processes leave the step out.

        Args:
            window: the rows.
            learning_rate: of this step; a parameter group may scale it.
            stop: whether this process was asked to stop; the answer for all of them comes back.

        Raises:
            RunError: where another process failed.
        """
        optimizer, scaler, group = self.live.optimizer, self.live.scaler, self.live.group
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate * settings.get(SCALE, 1.0)
        optimizer.zero_grad(set_to_none=True)
        with group.together():
            loss_sum, learnt = self._accumulate(window)
        total, count, asked = group.sum([float(loss_sum), float(learnt), float(stop)])
        group.sum_gradients(self._parameters)
        # An objective that counts something else than labelled tokens is normalised by what it counted.
        if count and count != window.learnt:
            self._multiply_gradients(max(1, window.learnt) / count)
        has_gradients = any(parameter.grad is not None for parameter in self._parameters)
        if scaler.is_enabled() and has_gradients:
            scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        grad_norm = float(norm)
        fault = self._fault(total, grad_norm, int(count))
        rescaled = fault is not None and math.isfinite(total) and scaler.is_enabled() and scaler.get_scale() > 1.0
        if fault is None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.max_grad_norm, norm)
            scaler.step(optimizer)
        if scaler.is_enabled() and has_gradients:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return StepResult(total, int(count), grad_norm, fault, rescaled, asked > 0)

    def _accumulate(self, window: Window) -> tuple[Tensor, int]:
        """Gradients of `sum of losses / learnt tokens of the window` for this process's share."""
        total = torch.zeros((), dtype=torch.float64, device=self.live.group.device)
        learnt = 0
        for micro in window.mine:
            loss, count = self.objective.loss_sum(self.batches(micro))
            if count:
                self.live.scaler.scale(loss / max(1, window.learnt)).backward()
            total += loss.detach()
            learnt += count
        return total, learnt

    def _multiply_gradients(self, factor: float) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _fault(self, loss_sum: float, grad_norm: float, count: int) -> str | None:
        if not count:
            return "nothing to learn in the rows of the step"
        if not math.isfinite(loss_sum):
            return "the loss is not finite"
        if math.isfinite(grad_norm):
            return None
        for name, parameter in self.live.parameters.items():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"the gradient of {name} is not finite"
        return "the norm of the gradients overflows"

"""Whether a QLoRA step of a 33B- or 65B-shaped model fits a smaller card: the figure is the driver's, not torch's.

A ballast tensor holds the rest of the card, so that what does not fit fails as it would on the smaller one. LoRA r=64
on all linear layers, NF4 with double quantization, checkpointing, paged 8-bit AdamW, one row of 2048 tokens.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from finetune.kernels import scratch

GIB = 2**30


class Watch:
    """The largest memory in use on a device, the context and all processes included, less a ballast."""

    def __init__(self, device: torch.device, ballast: int, interval: float = 0.01) -> None:
        self.device, self.ballast, self.interval = device, ballast, interval
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def used(self) -> int:
        """Bytes in use now, by the driver."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - self.ballast

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, self.used())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self.used())


def ballast_bytes(total: int, used: int, budget: int) -> int:
    """Bytes to hold so that, with what is in use already, only `budget` of the card serves."""
    return max(0, total - max(budget, used))


def train_steps(size: str, device: torch.device, rank: int, dtype: str, length: int, steps: int) -> dict[str, Any]:
    """Build, adapt and train on one row; losses and seconds."""
    from finetune.model.exchange import exchange, summary
    from finetune.quant.nf4 import NF4Config
    from finetune.training.config import OPTIMIZERS, TrainConfig
    from finetune.training.mode import training_mode
    from finetune.training.optimizers.paged_adamw_8bit import PagedAdamW8bitConfig
    from gpu.models import adapted, random_llama, sft_loss, token_ids

    start = time.perf_counter()
    model = random_llama(size, NF4Config(), device)
    fused = summary(exchange(model))
    parameters = adapted(model, rank, dtype)
    optimizer, note = OPTIMIZERS.build(PagedAdamW8bitConfig(), parameters, TrainConfig(learning_rate=1e-3), device)
    loss_of, ids = sft_loss(model), token_ids(size, 1, length, device)
    built = time.perf_counter() - start
    losses, seconds = [], []
    with training_mode(model, True):
        for _ in range(steps):
            start = time.perf_counter()
            loss = loss_of(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            seconds.append(round(time.perf_counter() - start, 3))
    trained = sum(parameter.numel() for parameter in parameters)
    figures = {"losses": losses, "step_seconds": seconds, "build_seconds": round(built, 1), "trained": trained}
    return {**figures, "note": note, "fused": fused}


def learns(losses: list[float]) -> bool:
    """Finite and falling."""
    return all(abs(loss) < 1e4 for loss in losses) and losses[-1] < losses[0]


def prove(size: str, budget_gib: float, emit: Callable[..., None], device: torch.device, dtype: str = "bf16") -> None:
    """Train three steps within a budget and report the peak; where it does not fit, the peak without a ballast."""
    key = f"memory_{size}"
    result, fault = None, ""
    try:
        result = within(size, int(budget_gib * GIB), device, dtype)
    except torch.OutOfMemoryError as error:
        fault = f"out of memory within {budget_gib:g} GiB: {error}".splitlines()[0]
    if result is None:  # out of the except block, whose traceback held the model
        emit("fault", key, reason=fault)
        result = within(size, torch.cuda.mem_get_info(device)[1], device, dtype)
    emit("detail", key, adapter_dtype=dtype, budget_gib=budget_gib, **result)
    if not learns(result["losses"]):
        emit("fault", key, reason=f"the losses are not finite and falling: {result['losses']}")
    emit("value", key, value=round(result["peak_gib"], 2))


def try_float32(size: str, budget_gib: float, emit: Callable[..., None], device: torch.device) -> None:
    """Whether adapters (and gradients) in float32 fit as well: a detail, no bar."""
    try:
        result: dict[str, Any] = {"fits": True, **within(size, int(budget_gib * GIB), device, "fp32")}
    except torch.OutOfMemoryError:
        result = {"fits": False}
    emit("detail", f"memory_{size}_float32_adapters", budget_gib=budget_gib, **result)


def within(size: str, budget: int, device: torch.device, dtype: str) -> dict[str, Any]:
    """Train with all but `budget` bytes of the card held by a ballast; the driver's peak, and torch's."""
    gc.collect()
    scratch.release()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.empty(1, device=device)  # makes the context, which counts
    free, total = torch.cuda.mem_get_info(device)
    held = ballast_bytes(total, total - free, budget)
    ballast = torch.empty(held, dtype=torch.uint8, device=device)
    try:
        with Watch(device, held) as watch:
            result = train_steps(size, device, rank=64, dtype=dtype, length=2048, steps=3)
            torch.cuda.synchronize(device)
    finally:
        del ballast
    allocated = (torch.cuda.max_memory_allocated(device) - held) / GIB
    return {"peak_gib": watch.peak / GIB, "torch_gib": allocated, **result}

"""How long, how fast and how carefully a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finetune.errors import ConfigError, nearest
from finetune.registry import Registry

DTYPES = ("auto", "bf16", "fp16", "fp32")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass
class TrainConfig:
    """The training loop. A *step* is an optimizer step; an epoch is one pass over the training rows.

    Attributes:
        max_steps: stop after this many steps; null leaves it to `epochs`.
        epochs: passes over the data; may be a fraction.
        batch_size: rows (packed: sequences) in a micro-batch, on each process.
        grad_accumulation: micro-batches in a step.
        learning_rate: the peak; null is the adapter's own, see `AdapterConfig.learning_rate`.
        head_step: how far an output of a head that was made for the task may move at one step, which gives its learning
            rate; null leaves it at the rate of everything else.
        schedule: cosine | linear | constant, after the warm-up.
        warmup_ratio: share of all steps spent rising from 0 to the peak.
        max_grad_norm: gradients are scaled down to this norm; null never.
        dtype: of activations and of the weights that are not quantized: auto | bf16 | fp16 | fp32. `auto` is bf16
            where the device computes in it, else fp32.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        log_every, eval_every, save_every: in steps; null evaluates and saves at the end alone.
        keep_checkpoints: how many are kept; the best and the last valid one are never removed.
        early_stopping: evaluations without improvement after which the run stops; null never.
        max_nonfinite: steps in a row with a loss or gradient that is not finite after which the run stops.
        preflight: the checks of the first seconds.
        samples: how many held-out prompts are answered before and after.
        sample_tokens: the longest such answer, in tokens.
    """

    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    grad_accumulation: int = 1
    learning_rate: float | None = None
    head_step: float | None = 1.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    max_grad_norm: float | None = 1.0
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    log_every: int = 10
    eval_every: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    early_stopping: int | None = None
    max_nonfinite: int = 5
    preflight: bool = True
    samples: int = 4
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        for key, value, choices in (("dtype", self.dtype, DTYPES), ("schedule", self.schedule, SCHEDULES)):
            if value not in choices:
                raise ConfigError(f"train.{key} is {value!r}: expected {' | '.join(choices)}{nearest(value, choices)}")
        at_least_one = (
            "max_steps",
            "batch_size",
            "grad_accumulation",
            "log_every",
            "eval_every",
            "save_every",
            "keep_checkpoints",
            "early_stopping",
            "max_nonfinite",
            "sample_tokens",
        )
        for key in at_least_one:
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"train.{key} is {value}: expected at least 1")
        for key in ("epochs", "learning_rate", "head_step", "max_grad_norm"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"train.{key} is {value}: expected more than 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"train.warmup_ratio is {self.warmup_ratio}: expected a share between 0 and 1")
        if self.samples < 0:
            raise ConfigError(f"train.samples is {self.samples}: expected 0 or more")
        if self.early_stopping is not None and self.eval_every is None:
            raise ConfigError(
                "train.early_stopping needs train.eval_every: without evaluations there is nothing to stop on"
            )


@dataclass
class OptimConfig:
    """An optimizer. Sub-classes are registered in `OPTIMIZERS`."""

    name: str = "base"


@dataclass
class ObjectiveConfig:
    """What is minimised. Sub-classes are registered in `OBJECTIVES`."""

    task: ClassVar[str] = "causal_lm"
    """The kind of model it needs, as `finetune.model.task.Task` names them."""

    name: str = "base"


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl. Sub-classes are registered in `TRACKERS`."""

    name: str = "base"


OPTIMIZERS: Registry[OptimConfig] = Registry("optim", "finetune.training.optimizers")
"""`OPTIMIZERS.build(config, params, train, device)` -> `(torch.optim.Optimizer, note | None)`; `params` are tensors or
groups of them, the note says what was substituted and why."""
OBJECTIVES: Registry[ObjectiveConfig] = Registry("objective", "finetune.training.objectives")
"""`OBJECTIVES.build(config, model)` -> an `Objective`."""
TRACKERS: Registry[TrackingConfig] = Registry("tracking", "finetune.training.trackers")
"""`TRACKERS.build(config, run)` -> a `Tracker`; none of its methods ever raises into the run."""

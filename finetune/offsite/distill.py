"""Teach the kept blocks to stand for the whole middle.

Xiao, Lin and Han 2023 (arXiv:2302.04870) section 3.3: the emulator's middle learns to give what the full middle gives,
beside the language modelling loss, before anything is shipped. Their code divides by one root mean square of the whole
batch; here each position is divided by its own, so that positions add up exactly over micro-batches and the few with
huge activations do not drown the others.

Shape suffixes: B rows, S positions, N learnt positions, H hidden features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.attach import attach
from finetune.adapters.base import Adapter
from finetune.adapters.layers import LayersConfig
from finetune.data.config import DataConfig
from finetune.data.prepare import prepare
from finetune.data.rows import IGNORE, Batch
from finetune.model.config import ModelConfig
from finetune.model.load import Loaded, context_length
from finetune.offsite.config import OffsiteConfig
from finetune.offsite.cut import Cut
from finetune.structure import inspect
from finetune.training.config import OBJECTIVES, OptimConfig, TrainConfig
from finetune.training.objectives.sft import SFTConfig


class Distillation:
    """lm_weight * cross entropy + kd_weight * ||(t - s) / rms(t)||^2 / H, summed over the learnt positions.

    t and s are what the last block of either middle gives.

    Args:
        student, teacher: causal language models; the teacher is only read.
        student_block, teacher_block: names of these last blocks.

    Attributes:
        note: as the language modelling loss has it.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_block: str,
        teacher_block: str,
        *,
        lm_weight: float,
        kd_weight: float,
    ) -> None:
        self.language: Any = OBJECTIVES.build(SFTConfig(), student)
        self.student, self.teacher = student, teacher
        self.blocks = student_block, teacher_block
        self.lm_weight, self.kd_weight = lm_weight, kd_weight
        # What feeds the blocks, without the head: the teacher's logits are not asked for.
        self.reader: Any = teacher.get_submodule(inspect(teacher).stacks[0].name)
        self.note: str | None = self.language.note

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss over the learnt positions (float32 scalar with a graph) and their number."""
        learnt_BS = batch.shifted_labels_BS() != IGNORE
        with given(self.student, self.blocks[0]) as seen:
            loss, count = self.language.loss_sum(batch)
        student_NH = seen[0][learnt_BS].float()
        with torch.no_grad(), given(self.teacher, self.blocks[1]) as seen:
            self.reader(**batch.model_inputs())
        teacher_NH = seen[0][learnt_BS].float()
        return self.lm_weight * loss + self.kd_weight * distance(student_NH, teacher_NH), count


def distance(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """Summed over positions: the mean squared difference in units of the teacher's root mean square there."""
    square_N = teacher_NH.pow(2).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((teacher_NH - student_NH).pow(2).mean(-1) / square_N).sum()


@contextmanager
def given(model: nn.Module, block: str) -> Iterator[list[Tensor]]:
    """Collect the hidden states [B, S, H] that a block hands on, once for each call of the model."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = model.get_submodule(block).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass
class Distilled:
    """The taught middle.

    Attributes:
        adapter: attached to the emulator; what it merges to is the new middle.
        record: how it was taught, for offsite.json; losses are those of the objective, a token.
        status, signal: as the loop ended.
    """

    adapter: Adapter
    record: dict[str, Any]
    status: str
    signal: int | None


def distill(
    full: Loaded,
    emulator: Loaded,
    cut: Cut,
    offsite: OffsiteConfig,
    *,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    optim: OptimConfig,
    accelerator: Any,
    run: Any,
    seed: int,
) -> Distilled:
    """Train the emulator's middle against the full model with the loop of every other training.

    Args:
        full, emulator: in memory, dense, in one dtype; the full model is only read.
        train: settings of the loop; `offsite.distill_steps` decides its length, the models' dtype its own.
        run: an open run directory.

    Raises:
        UserError: for data that cannot be used, and whatever stops the loop.
    """
    from finetune.training.loop import train as loop
    from finetune.training.schedule import peak
    from finetune.training.trackers.off import Off

    rows = prepare(data, emulator.tokenizer, context=context_length(model), seed=seed)
    torch.manual_seed(seed)
    adapter = attach(emulator.model, LayersConfig(layers=cut.middle))
    dtypes = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    settings = replace(train, max_steps=offsite.distill_steps, dtype=dtypes[emulator.model.dtype])  # type: ignore[index]
    last_blocks = cut.names[cut.middle[-1]], cut.full_middle()[-1]
    lm_weight, kd_weight = offsite.lm_weight, offsite.kd_weight
    objective = Distillation(emulator.model, full.model, *last_blocks, lm_weight=lm_weight, kd_weight=kd_weight)
    result = loop(
        emulator.model,
        adapter,
        rows.train,
        rows.eval,
        objective=objective,
        config=settings,
        optim=optim,
        run=run,
        tracker=Off(),
        accelerator=accelerator,
        pad_id=emulator.pad_id,
        packing=rows.packing,
        max_length=rows.report.max_length,
        seed=seed,
    )
    rate = peak(settings, adapter)
    # Shipped: it says nothing of where the owner's data lie.
    record: dict[str, Any] = {"steps": result.steps, "learning_rate": rate}
    record |= {"lm_weight": lm_weight, "kd_weight": kd_weight}
    record |= {"loss_first": result.first_eval, "loss_best": result.best_eval}
    return Distilled(adapter, record, result.status, result.signal)

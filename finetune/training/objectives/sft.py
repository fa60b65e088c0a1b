"""Supervised fine-tuning: next-token cross entropy over the labelled positions.

Shape suffixes: B rows, S positions, N learnt positions, H hidden features, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune.data.rows import IGNORE, Batch
from finetune.kernels.cross_entropy import chunk_rows, linear_cross_entropy, logits_of
from finetune.quant.base import FrozenLinear
from finetune.structure.head import Head, captured, describe_head
from finetune.training.config import OBJECTIVES, ObjectiveConfig


@dataclass
class SFTConfig(ObjectiveConfig):
    """Next-token cross entropy on the labelled positions, summed."""

    name: str = "sft"


@OBJECTIVES.register(SFTConfig)
def build(config: SFTConfig, model: nn.Module) -> SFT:
    """The objective for a loaded model, adapter attached or not."""
    return SFT(model, describe_head(model))


class SFT:
    """Summed cross entropy, chunked over positions where the head is understood.

    Attributes:
        note: the line to tell the user where full logits are needed, else None.
    """

    def __init__(self, model: nn.Module, head: Head | None) -> None:
        self.model, self.head = model, head
        self.note = (
            None
            if head
            else f"the head of {type(model).__name__} is not understood: full logits are computed, in more memory"
        )

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss over the learnt positions (float32 scalar with a graph) and their number.

        A mixture-of-experts model's load-balancing term counts once for every learnt token, so that after division
        by the tokens of the step it enters with the model's own coefficient.
        """
        labels_BS = batch.shifted_labels_BS()
        learnt_BS = labels_BS != IGNORE
        labels_N = labels_BS[learnt_BS]
        if self.head is None:
            return self._from_logits(batch, learnt_BS, labels_N), len(labels_N)
        hidden_BSH, aux = self._hidden(self.head, batch)
        loss = head_loss(self.head, hidden_BSH[learnt_BS], labels_N)
        if aux is not None:
            loss = loss + aux.float() * (self.head.aux_coefficient * len(labels_N))
        return loss, len(labels_N)

    def _hidden(self, head: Head, batch: Batch) -> tuple[Tensor, Tensor | None]:
        inputs: dict[str, Any] = batch.model_inputs()
        if not head.aux_coefficient:
            return head.decoder(**inputs)[0], None
        # only the whole model computes its auxiliary loss; it need not compute more logits than one position's
        with captured(head.decoder) as seen:
            outputs = self.model(**inputs, logits_to_keep=1)
        return seen[0], outputs.aux_loss

    def _from_logits(self, batch: Batch, learnt_BS: Tensor, labels_N: Tensor) -> Tensor:
        outputs = self.model(**batch.model_inputs())
        return F.cross_entropy(outputs.logits[learnt_BS].float(), labels_N, reduction="sum")


def head_loss(head: Head, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Summed cross entropy behind a head, however the head keeps its weight."""
    module = head.module
    if type(module) is nn.Linear and not has_hooks(module):
        return linear_cross_entropy(
            hidden_NH, module.weight, labels_N, bias_V=module.bias, scale=head.scale, softcap=head.softcap
        )
    if isinstance(module, FrozenLinear) and not has_hooks(module):
        weight_VH = module.dequantize(hidden_NH.dtype)
        return linear_cross_entropy(
            hidden_NH, weight_VH, labels_N, bias_V=module.bias, scale=head.scale, softcap=head.softcap
        )
    return _chunks_through(head, hidden_NH, labels_N)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else takes part in the module's forward, so that its weight alone does not decide."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _chunks_through(head: Head, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """An adapted head: its own forward on a chunk at a time, computed again in the backward pass."""

    def loss_of(hidden_CH: Tensor, labels_C: Tensor) -> Tensor:
        z_CV = head.module(hidden_CH)
        return F.cross_entropy(logits_of(z_CV, head.scale, head.softcap).float(), labels_C, reduction="sum")

    known: Any = getattr(head.module, "out_features", None)
    vocab = int(known) if known else 2**17
    rows = chunk_rows(vocab)
    total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
    for start in range(0, len(labels_N), rows):
        cut = slice(start, start + rows)
        total = total + checkpoint(loss_of, hidden_NH[cut], labels_N[cut], use_reentrant=False)
    return total

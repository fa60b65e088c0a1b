"""How far the quantized model is from the dense one, on text that neither was calibrated on.

Shape suffixes: P learnt positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.rows import Batch
from finetune.evaluation import Divergence, RowLosses, predictions
from finetune.quantize.text import batches_of

MOST_NUMBERS = 1 << 26
"""Log-probabilities of the dense model that are kept: 256 MiB."""


class Reference:
    """What the dense model predicts on held-out pieces; as many of them as there is room for.

    Args:
        model: dense.
        pieces: of tokens.
    """

    def __init__(self, model: Any, pieces: list[Tensor]) -> None:
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.pieces: list[Tensor] = []
        room = MOST_NUMBERS // vocabulary
        for piece in pieces:
            if room < len(piece) and self.pieces:
                break
            self.pieces.append(piece)
            room -= len(piece)
        self.log_probs: list[Tensor] = []
        self.losses = RowLosses()
        for seen in predictions(model, self._batches(), _device(model)):
            self.log_probs.append(seen.log_probs_PV.cpu())
            self.losses.add(seen.losses_P(), seen.rows_P)

    def compare(self, model: nn.Module) -> dict[str, float | int | None]:
        """The quantized model against it: losses in nats a token, KL(dense || quantized)."""
        losses, divergence = RowLosses(), Divergence()
        for seen, dense in zip(predictions(model, self._batches(), _device(model)), self.log_probs, strict=True):
            losses.add(seen.losses_P(), seen.rows_P)
            divergence.add(dense, seen.log_probs_PV.cpu())
        return {
            "tokens": len(divergence.kl),
            "loss_dense": figure_or_none(self.losses.loss),
            "loss": figure_or_none(losses.loss),
            "perplexity_dense": figure_or_none(math.exp(min(self.losses.loss, 700))),
            "perplexity": figure_or_none(math.exp(min(losses.loss, 700))),
            "kl_mean": figure_or_none(divergence.mean),
            "kl_p99": figure_or_none(divergence.p99),
            "top1_agreement": figure_or_none(divergence.top1_agreement),
        }

    def _batches(self) -> Iterator[Batch]:
        for inputs in batches_of(self.pieces):
            ids = inputs["input_ids"]
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            yield Batch(ids, ids, positions, torch.ones_like(ids))


def figure_or_none(value: float) -> float | None:
    """A figure for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

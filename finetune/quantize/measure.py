"""How far the quantized model is from the dense one, on text that neither was calibrated on.

Shape suffixes: P learnt positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.rows import Batch
from finetune.evaluation import Divergence, Predictions, RowLosses, predictions
from finetune.quantize.text import batches_of

MOST_NUMBERS = 1 << 26
"""Log-probabilities of the dense model that are kept, at most: 256 MiB."""
BATCH_NUMBERS = 1 << 24
"""Log-probabilities that a batch of more than one piece may take."""


class Comparison:
    """What a quantized model predicts against what the dense one does, slice by slice."""

    def __init__(self) -> None:
        self._dense, self._losses, self._divergence = RowLosses(), RowLosses(), Divergence()

    def add(self, dense: Predictions, quantized: Predictions) -> None:
        """Both models at the same positions, wherever they are."""
        self._dense.add(dense.losses_P(), dense.rows_P)
        self._losses.add(quantized.losses_P(), quantized.rows_P)
        self._divergence.add(dense.log_probs_PV.cpu(), quantized.log_probs_PV.cpu())

    def figures(self) -> dict[str, float | int | None]:
        """Losses in nats a token, KL(dense || quantized)."""
        before, after = self._dense.loss, self._losses.loss
        return {
            "tokens": len(self._divergence.kl),
            "loss_dense": figure_or_none(before),
            "loss": figure_or_none(after),
            "perplexity_dense": figure_or_none(math.exp(min(before, 700))),
            "perplexity": figure_or_none(math.exp(min(after, 700))),
            "kl_mean": figure_or_none(self._divergence.mean),
            "kl_p99": figure_or_none(self._divergence.p99),
            "top1_agreement": figure_or_none(self._divergence.top1_agreement),
        }


def measured_on(pieces: list[Tensor], vocabulary: int) -> list[Batch]:
    """Rows to measure on: as many of the pieces as there is room for.

    Args:
        vocabulary: predictions that the model makes at each position.
    """
    chosen: list[Tensor] = []
    room = MOST_NUMBERS // vocabulary
    for piece in pieces:
        if room < len(piece) and chosen:
            break
        chosen.append(piece)
        room -= len(piece)
    rows = []
    for inputs in batches_of(chosen, BATCH_NUMBERS // vocabulary):
        ids = inputs["input_ids"]
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        rows.append(Batch(ids, ids, positions, torch.ones_like(ids)))
    return rows


class Reference:
    """What the dense model predicts on held-out pieces.

    Args:
        model: dense.
        pieces: of tokens.
    """

    def __init__(self, model: Any, pieces: list[Tensor]) -> None:
        self._rows = measured_on(pieces, int(model.get_output_embeddings().weight.shape[0]))
        self._dense = [
            Predictions(seen.log_probs_PV.cpu(), seen.targets_P.cpu(), seen.rows_P.cpu())
            for seen in predictions(model, self._rows, _device(model))
        ]

    def compare(self, model: nn.Module) -> dict[str, float | int | None]:
        """The quantized model against it."""
        comparison = Comparison()
        for dense, seen in zip(self._dense, predictions(model, self._rows, _device(model)), strict=True):
            comparison.add(dense, seen)
        return comparison.figures()


def figure_or_none(value: float) -> float | None:
    """A figure for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

"""Held-out loss, and how far one model's predictions are from another's, over an iterator of batches.

Training, quantization reports and export proofs all measure with this file. Everything streams: the logits of one batch
exist at a time, log-probabilities at its learnt positions alone, in slices of at most `SLICE_ELEMENTS`.

Shape suffixes: B rows of a batch, S positions, P learnt positions of a slice, V vocabulary, R rows of the whole set.
Losses and divergences are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from finetune.data.rows import IGNORE, Batch

SLICE_ELEMENTS = 1 << 22
"""Log-probabilities held at once: 16 MiB in float32 (32 in float64, where divergences are summed)."""


@dataclass(frozen=True)
class EvalLoss:
    """Mean loss over learnt tokens.

    Attributes:
        loss: nats per token; NaN where nothing was learnt.
        tokens: learnt positions.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where it would not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def loss_per_token(loss_sum: Callable[[Batch], tuple[Tensor, int]], batches: Iterable[Batch]) -> EvalLoss:
    """Mean of an objective's `loss_sum` over all learnt tokens of the batches. The model's mode is the caller's."""
    total, tokens = 0.0, 0
    for batch in batches:
        loss, count = loss_sum(batch)
        total, tokens = total + float(loss), tokens + count
    return EvalLoss(total / tokens if tokens else math.nan, tokens)


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at some learnt positions.

    Attributes:
        log_probs_PV: float32 log-probabilities.
        targets_P: the token to learn there.
        rows_P: which row of the set, counted from 0 over the rows that have a learnt position, in order.
    """

    log_probs_PV: Tensor
    targets_P: Tensor
    rows_P: Tensor

    def losses_P(self) -> Tensor:
        """Negative log-likelihood of the targets, float32."""
        return -self.log_probs_PV.gather(1, self.targets_P[:, None])[:, 0]


@dataclass(frozen=True)
class NumberPredictions(Predictions):
    """The numbers that a model gives rows: `log_probs_PV` [P, 1] holds them, P counts rows."""

    def losses_P(self) -> Tensor:
        """Squared errors, float32."""
        return (self.log_probs_PV[:, 0] - self.targets_P.float()) ** 2


@torch.no_grad()
def predictions(model: nn.Module, batches: Iterable[Batch], device: torch.device | str) -> Iterator[Predictions]:
    """Run a transformers model and yield its predictions at every learnt position, row by row, packed or not.

    Of rows with a target of their own the row as a whole is the one learnt position, and the classes are the
    vocabulary.

    Args:
        model: called with `Batch.model_inputs()`; must return `.logits` [B, S, V], or [B, V] for rows with targets.
            Its mode is the caller's.
        batches: right-padded or packed rows.
        device: where the model is.
    """
    rows_before = 0
    for batch in batches:
        moved = batch.to(device)
        if moved.targets_B is not None:
            logits_PV, rows_P = model(**moved.model_inputs()).logits.float(), torch.arange(len(moved.targets_B))
            if moved.targets_B.is_floating_point():
                yield NumberPredictions(logits_PV, moved.targets_B, rows_P + rows_before)
            else:
                yield Predictions(torch.log_softmax(logits_PV, -1), moved.targets_B, rows_P + rows_before)
            rows_before += len(rows_P)
            continue
        targets_BS = moved.shifted_labels_BS()
        learnt_BS = targets_BS != IGNORE
        if not bool(learnt_BS.any()):
            continue
        # Positions restart at each row, so the restarts number the rows; only rows with something to learn are counted.
        starts_BS = moved.position_ids_BS == 0
        starts_BS[:, 0] = True
        segment_P = starts_BS.flatten().cumsum(0)[learnt_BS.flatten()]
        rows_P = torch.unique_consecutive(segment_P, return_inverse=True)[1] + rows_before
        rows_before = int(rows_P[-1]) + 1
        logits_PV = model(**moved.model_inputs()).logits[learnt_BS]
        targets_P = targets_BS[learnt_BS]
        step = max(1, SLICE_ELEMENTS // logits_PV.shape[-1])
        for cut in (slice(begin, begin + step) for begin in range(0, len(targets_P), step)):
            yield Predictions(torch.log_softmax(logits_PV[cut].float(), -1), targets_P[cut], rows_P[cut])


@dataclass
class RowLosses:
    """Summed loss and learnt tokens of each row, gathered slice by slice in float64."""

    sums: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, losses_P: Tensor, rows_P: Tensor) -> None:
        """Add the losses of some positions; rows come in order."""
        for row, loss in zip(rows_P.tolist(), losses_P.double().tolist(), strict=True):
            while len(self.sums) <= row:
                self.sums.append(0.0)
                self.tokens.append(0)
            self.sums[row] += loss
            self.tokens[row] += 1

    @property
    def loss(self) -> float:
        """Nats per learnt token over all rows."""
        return sum(self.sums) / sum(self.tokens) if self.tokens else math.nan

    def difference_error(self, other: RowLosses) -> float:
        """Standard error, over rows, of `self.loss - other.loss`.

        Both are ratios of the same per-row token counts, so the difference is one ratio estimator, and its linearised
        error is sqrt(R / (R - 1) * sum_r (d_r - d * n_r)^2) / N, with d_r the row's difference in summed loss, n_r its
        tokens, N all tokens and d the mean difference (Cochran, Sampling Techniques, 3rd edition, section 6.4).
        Infinite below two rows: one row says nothing about its own spread.

        Raises:
            ValueError: when the two were not measured on the same rows.
        """
        if self.tokens != other.tokens:
            raise ValueError("the two losses were measured on different rows")
        rows, total = len(self.tokens), sum(self.tokens)
        if rows < 2:
            return math.inf
        mean = self.loss - other.loss
        triples = zip(self.sums, other.sums, self.tokens, strict=True)
        spread = math.fsum((mine - theirs - mean * count) ** 2 for mine, theirs, count in triples)
        return math.sqrt(rows / (rows - 1) * spread) / total


@dataclass
class Divergence:
    """KL(reference || candidate) per position and agreement on the likeliest token, gathered slice by slice."""

    kl: list[float] = field(default_factory=list)
    agreed: int = 0

    def add(self, reference_PV: Tensor, candidate_PV: Tensor) -> None:
        """Add positions from two sets of log-probabilities of the same shape; sums run in float64 over all tokens.

        Raises:
            ValueError: when the shapes differ.
        """
        if reference_PV.shape != candidate_PV.shape:
            raise ValueError(f"log-probabilities of shapes {tuple(reference_PV.shape)} and {tuple(candidate_PV.shape)}")
        step = max(1, SLICE_ELEMENTS // reference_PV.shape[-1])
        for reference, candidate in zip(reference_PV.split(step), candidate_PV.split(step), strict=True):
            p, q = reference.double(), candidate.double()
            # A token that the reference rules out (log 0) adds nothing, whatever the candidate thinks of it.
            terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
            self.kl += terms.sum(-1).tolist()
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())

    @property
    def mean(self) -> float:
        """Mean KL, nats a token."""
        return math.fsum(self.kl) / len(self.kl) if self.kl else math.nan

    @property
    def p99(self) -> float:
        """99th percentile of the KL, linearly interpolated."""
        return float(torch.tensor(self.kl, dtype=torch.float64).quantile(0.99)) if self.kl else math.nan

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both find the same token likeliest."""
        return self.agreed / len(self.kl) if self.kl else math.nan


@dataclass
class NormalDivergence(Divergence):
    """KL between normal distributions of one variance around two predicted numbers: (a - b)^2 / 2 variance.

    Attributes:
        variance: of what is predicted, which makes the divergence independent of its unit.
    """

    variance: float = 1.0

    def add(self, reference_PV: Tensor, candidate_PV: Tensor) -> None:
        """Add the numbers of some rows, [P, 1] each.

        Raises:
            ValueError: when the shapes differ.
        """
        if reference_PV.shape != candidate_PV.shape:
            raise ValueError(f"numbers of shapes {tuple(reference_PV.shape)} and {tuple(candidate_PV.shape)}")
        distance_P = (reference_PV.double() - candidate_PV.double())[:, 0]
        self.kl += (distance_P**2 / (2 * self.variance)).tolist()

    @property
    def top1_agreement(self) -> float:
        """NaN: numbers have no likeliest one."""
        return math.nan

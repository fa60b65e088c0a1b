"""Losses and divergences against float64 arithmetic over full logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from finetune import evaluation
from finetune.data.rows import IGNORE, Batch
from finetune.evaluation import Divergence, EvalLoss, RowLosses, loss_per_token, predictions

VOCABULARY = 11


class Bigram(nn.Module):
    """Logits that depend on the current token alone, so that packing cannot change them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def rows() -> list[tuple[list[int], list[int]]]:
    return [
        ([1, 2, 3, 4], [IGNORE, 2, 3, 4]),
        ([5, 6], [IGNORE, IGNORE]),
        ([7, 8, 9, 10, 0], [IGNORE, IGNORE, 9, IGNORE, 0]),
    ]


def padded() -> Iterator[Batch]:
    for chunk in (rows()[:2], rows()[2:]):
        width = max(len(ids) for ids, _ in chunk) + 1
        pad = [width - len(ids) for ids, _ in chunk]
        yield Batch(
            torch.tensor([ids + [0] * n for (ids, _), n in zip(chunk, pad, strict=True)]),
            torch.tensor([labels + [IGNORE] * n for (_, labels), n in zip(chunk, pad, strict=True)]),
            torch.arange(width).expand(len(chunk), -1).clone(),
            torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in zip(chunk, pad, strict=True)]),
        )


def packed() -> Iterator[Batch]:
    ids = [token for row, _ in rows() for token in row]
    labels = [label for _, row in rows() for label in row]
    positions = [i for row, _ in rows() for i in range(len(row))]
    yield Batch(torch.tensor([ids]), torch.tensor([labels]), torch.tensor([positions]), None)


def by_hand(model: Bigram) -> list[list[float]]:
    log_probs = torch.log_softmax(model.table.double(), -1)
    return [
        [-float(log_probs[ids[i], labels[i + 1]]) for i in range(len(ids) - 1) if labels[i + 1] != IGNORE]
        for ids, labels in rows()
    ]


@pytest.mark.parametrize("batches", [padded, packed])
def test_row_losses_equal_the_sum_by_hand(batches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SLICE_ELEMENTS", 2 * VOCABULARY)
    model = Bigram()
    losses = RowLosses()
    slices = list(predictions(model, batches(), "cpu"))
    for part in slices:
        assert len(part.targets_P) <= 2, "a slice holds more than SLICE_ELEMENTS"
        losses.add(part.losses_P(), part.rows_P)
    expected = [row for row in by_hand(model) if row]
    assert losses.tokens == [len(row) for row in expected] == [3, 2]
    assert losses.sums == pytest.approx([sum(row) for row in expected], rel=1e-6)
    assert losses.loss == pytest.approx(sum(map(sum, expected)) / 5, rel=1e-6)


def test_loss_per_token_weighs_batches_by_their_tokens() -> None:
    sums = {3: 6.0, 1: 10.0}
    counts = iter(sums)

    def loss_sum(_: Batch) -> tuple[Tensor, int]:
        count = next(counts)
        return torch.tensor(sums[count]), count

    assert loss_per_token(loss_sum, padded()) == EvalLoss(4.0, 4)
    assert math.isnan(loss_per_token(loss_sum, []).loss)
    assert EvalLoss(math.log(8), 1).perplexity == pytest.approx(8)
    assert EvalLoss(1e4, 1).perplexity == math.inf


def test_divergence_is_exact_and_directed() -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.log_softmax(torch.randn(500, 64, generator=generator), -1)
    q = torch.log_softmax(p + 0.3 * torch.randn(500, 64, generator=generator), -1)
    result = Divergence()
    result.add(p[:123], q[:123])
    result.add(p[123:], q[123:])
    kl = (p.double().exp() * (p.double() - q.double())).sum(-1)
    assert result.mean == pytest.approx(float(kl.mean()), rel=1e-12)
    assert result.p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-12)
    assert result.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean()) < 1
    swapped = Divergence()
    swapped.add(q, p)
    assert swapped.mean != pytest.approx(result.mean, rel=1e-6)


def test_divergence_of_impossible_tokens() -> None:
    both = torch.log(torch.tensor([[0.5, 0.5, 0.0]]))
    result = Divergence()
    result.add(both, both)
    assert result.kl == [0.0]
    result.add(both, torch.log(torch.tensor([[1.0, 0.0, 0.0]])))
    assert result.kl[1] == math.inf
    result.add(both, torch.full((1, 3), math.nan))
    assert math.isnan(result.mean), "NaN must reach the gate, not vanish"
    with pytest.raises(ValueError, match=r"shapes \(1, 3\) and \(1, 2\)"):
        result.add(both, both[:, :2])


def test_difference_error_agrees_with_a_bootstrap() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, 60, (400,), generator=generator)
    base = tokens * (3 + 0.5 * torch.randn(400, generator=generator, dtype=torch.float64))
    tuned = base - tokens * (0.2 + 0.4 * torch.randn(400, generator=generator, dtype=torch.float64))
    error = RowLosses(base.tolist(), tokens.tolist()).difference_error(RowLosses(tuned.tolist(), tokens.tolist()))
    picks = torch.randint(0, 400, (2000, 400), generator=generator)
    means = (base - tuned)[picks].sum(1) / tokens[picks].sum(1)
    assert error == pytest.approx(float(means.std()), rel=0.1)


def test_difference_error_refuses_what_it_cannot_know() -> None:
    assert RowLosses([1.0], [2]).difference_error(RowLosses([2.0], [2])) == math.inf
    with pytest.raises(ValueError, match="different rows"):
        RowLosses([1.0], [2]).difference_error(RowLosses([2.0], [3]))

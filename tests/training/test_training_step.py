"""What one optimizer step computes: normalisation, accumulation, clipping, faults."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import training_setup as setup

from finetune.data.batching import collate
from finetune.errors import ConfigError, RunError
from finetune.training.config import TrainConfig
from finetune.training.objectives.sft import SFTConfig, build
from finetune.training.run_directory import read_metrics
from finetune.training.schedule import learning_rate
from finetune.training.window import Plan, learnt_per_row


def gradient_of_the_mean(rows, indices):
    """Oracle: one padded batch through the model's own loss, in float64."""
    model = setup.tiny_model().double()
    adapter = setup.HandMade(model)
    for parameter in adapter.trainable().values():
        parameter.data = parameter.data.double()
    batch = collate(rows, [[i] for i in indices], 0)
    model(**batch.model_inputs(), labels=batch.labels_BS).loss.backward()
    return {name: p.grad for name, p in adapter.trainable().items()}


@pytest.mark.parametrize(("batch_size", "grad_accumulation"), [(8, 1), (4, 2), (3, 3), (1, 8)])
def test_n_micro_batches_are_one_big_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, grad_accumulation: int
) -> None:
    rows = setup.rows(8, seed=3)
    seen: list[dict[str, torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    setup.run_training(
        tmp_path / "run",
        train_rows=rows,
        batch_size=batch_size,
        grad_accumulation=grad_accumulation,
        epochs=1,
        max_grad_norm=None,
    )
    assert len(seen) == 1, "one epoch is one window"
    oracle = gradient_of_the_mean(rows, range(8))
    for found, wanted in zip(seen[0], oracle.values(), strict=True):
        assert (found.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max().clamp_min(1e-3)


def test_a_ragged_last_window_counts_its_own_tokens(tmp_path: Path) -> None:
    """7 rows, 2 a micro-batch, 3 micro-batches a step: the second step has one row, and its loss is that row's mean."""
    rows = setup.rows(7, seed=5)
    config = dict(train_rows=rows, batch_size=2, grad_accumulation=3, epochs=1, learning_rate=1e-12)
    setup.run_training(tmp_path / "run", **config)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    plan = Plan(
        rows, TrainConfig(batch_size=2, grad_accumulation=3), packing=False, max_length=32, seed=0, world=1, rank=0
    )
    windows = plan.windows(0, 0)
    model = setup.tiny_model()
    for loss in losses:
        members = [sequence for micro in next(windows).mine for sequence in micro]
        batch = collate(rows, members, 0)
        assert loss == pytest.approx(model(**batch.model_inputs(), labels=batch.labels_BS).loss.item(), rel=1e-5)
    assert len(losses) == 2


def test_an_objective_that_counts_otherwise_is_normalised_by_its_own_count(tmp_path: Path) -> None:
    """Counting rows instead of tokens gives the same weights as multiplying by tokens a row would."""
    model = setup.tiny_model()
    inner = build(SFTConfig(), model)

    class PerRow:
        note = None

        def loss_sum(self, batch):
            loss, _ = inner.loss_sum(batch)
            return loss, batch.labels_BS.shape[0]

    _, tensors = setup.run_training(
        tmp_path / "a", model=model, objective=PerRow(), max_steps=1, batch_size=4, max_grad_norm=1e-3
    )
    _, split = setup.run_training(
        tmp_path / "b",
        model=(other := setup.tiny_model()),
        max_steps=1,
        batch_size=2,
        grad_accumulation=2,
        objective=build(SFTConfig(), other),
        max_grad_norm=1e-3,
    )
    for name in tensors:  # clipped to the same norm, so only the direction matters
        torch.testing.assert_close(tensors[name], split[name], rtol=1e-3, atol=1e-5)


def test_clipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        norms.append(math.sqrt(sum(float(p.grad.norm() ** 2) for g in self.param_groups for p in g["params"])))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    setup.run_training(tmp_path / "run", max_steps=2, max_grad_norm=1e-4)
    assert norms == pytest.approx([1e-4, 1e-4], rel=1e-2)
    assert all(line["grad_norm"] > 1e-4 for line in read_metrics(tmp_path / "run") if "loss" in line)


def test_schedules() -> None:
    for name, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 2e-4)):
        config = TrainConfig(schedule=name, learning_rate=2e-4, warmup_ratio=0.1)
        rates = [learning_rate(step, 100, config) for step in range(101)]
        assert rates[:10] == pytest.approx([2e-5 * i for i in range(1, 11)])
        assert rates[10] == pytest.approx(2e-4) and rates[100] == pytest.approx(last, abs=1e-12)
        assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_learnt_tokens_are_those_of_the_batches() -> None:
    rows = setup.rows(20, seed=2)
    for index in range(20):
        assert learnt_per_row(rows)[index] == collate(rows, [[index]], 0).target_tokens()


def test_epochs_and_steps() -> None:
    rows = setup.rows(10)

    def steps(**settings):
        config = TrainConfig(batch_size=2, grad_accumulation=2, **settings)
        return Plan(rows, config, packing=False, max_length=32, seed=0, world=1, rank=0).total_steps()

    assert (steps(), steps(epochs=2), steps(epochs=0.5), steps(epochs=0.01), steps(max_steps=7)) == (3, 6, 2, 1, 7)


def test_every_row_is_seen_once_an_epoch_by_all_processes_together() -> None:
    rows = setup.rows(23)
    seen: list[int] = []
    for rank in range(3):
        config = TrainConfig(batch_size=2, grad_accumulation=2)
        plan = Plan(rows, config, packing=True, max_length=32, seed=0, world=3, rank=rank)
        for window in plan.windows(0, 0):
            if window.progress > 1:
                break
            seen += [row for micro in window.mine for sequence in micro for row in sequence]
    assert sorted(seen) == list(range(23))


class Poisoned:
    """An objective that is not finite at some calls."""

    note = None

    def __init__(self, model, bad, kind="loss"):
        self.inner, self.bad, self.kind, self.calls = build(SFTConfig(), model), bad, kind, 0

    def loss_sum(self, batch):
        loss, count = self.inner.loss_sum(batch)
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls in self.bad:
                loss = loss * math.nan if self.kind == "loss" else loss + (loss - loss.detach()) * math.inf
        return loss, count


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    model = setup.tiny_model()
    result, tensors = setup.run_training(
        tmp_path / "run", model=model, objective=Poisoned(model, {2, 4}, kind), max_steps=6
    )
    assert result.status == "finished" and result.skipped_steps == 2
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, False, False]
    assert lines[-1]["skipped_steps"] == 2


def test_too_many_in_a_row_stop_with_the_cause_and_the_last_weights(tmp_path: Path) -> None:
    model = setup.tiny_model()
    with pytest.raises(
        RunError, match=r"step 5: the loss is not finite, for 3 steps in a row.*step-00000005"
    ) as caught:
        setup.run_training(
            tmp_path / "run", model=model, objective=Poisoned(model, {3, 4, 5, 6, 7}), max_steps=9, max_nonfinite=3
        )
    assert "\n" not in str(caught.value)
    stored = torch.cat([p.flatten() for n, p in sorted(model.named_parameters()) if "delta" in n])
    assert stored.isfinite().all() and stored.abs().max() > 0
    # going on from there works
    result, _ = setup.run_training(tmp_path / "run", max_steps=9)
    assert result.steps == 9


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'cosine'"):
        TrainConfig(schedule="cosin")
    with pytest.raises(ConfigError, match=r"train.batch_size is 0"):
        TrainConfig(batch_size=0)


def test_learning_happens(tmp_path: Path) -> None:
    result, _ = setup.run_training(tmp_path / "run", epochs=12, learning_rate=3e-2)
    assert result.last_eval < 0.9 * result.first_eval


def test_gradient_checkpointing_computes_the_same_and_starves_nobody(tmp_path: Path) -> None:
    _, plain = setup.run_training(tmp_path / "a", max_steps=4)
    _, recomputed = setup.run_training(tmp_path / "b", max_steps=4, gradient_checkpointing=True)
    for name, tensor in plain.items():
        assert tensor.any(), name
        torch.testing.assert_close(tensor, recomputed[name], rtol=1e-4, atol=1e-6)


def test_bf16_and_fp16(tmp_path: Path) -> None:
    for dtype in ("bf16", "fp16"):
        model = setup.tiny_model().to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
        result, tensors = setup.run_training(tmp_path / dtype, model=model, epochs=8, learning_rate=3e-2, dtype=dtype)
        assert result.last_eval < 0.95 * result.first_eval, dtype
        assert result.skipped_steps < 4
        assert all(t.dtype == torch.float32 for t in tensors.values())


def test_one_row_of_any_length_is_enough(tmp_path: Path) -> None:
    result, _ = setup.run_training(tmp_path / "run", train_rows=setup.rows(1), eval_rows=setup.rows(0), epochs=2)
    assert result.steps == 2 and result.first_eval is None and np.isfinite(result.epochs)

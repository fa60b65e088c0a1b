"""Teaching the middle: the loss by its formula, additive, with gradients for the middle alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from offsite_tiny import checkpoint, emulator_of, text_rows

from finetune.adapters.attach import attach
from finetune.adapters.layers import LayersConfig
from finetune.data.batching import collate
from finetune.data.rows import IGNORE, Row, TokenRows
from finetune.model.config import ModelConfig
from finetune.model.load import load
from finetune.offsite.distill import Distillation, distance, given
from finetune.quant.keep import KeepConfig


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    base = checkpoint(root / "base")
    return base, emulator_of(base, root / "emulator")


def loaded(path: Path) -> Any:
    return load(ModelConfig(path=str(path)), KeepConfig(), torch.float32, "cpu").model


def batch(*lengths: int) -> Any:
    draw = np.random.default_rng(0)
    rows = [Row(ids := draw.integers(3, 28, n).astype(np.int32), ids.copy()) for n in lengths]
    for row in rows:
        row.labels[:2] = IGNORE
    return collate(TokenRows.of(rows), [[i] for i in range(len(rows))], 0)


def objective(student: Any, teacher: Any, lm_weight: float, kd_weight: float) -> Distillation:
    blocks = "model.layers.2", "model.layers.4"
    return Distillation(student, teacher, *blocks, lm_weight=lm_weight, kd_weight=kd_weight)


def test_distance_is_in_units_of_the_teacher() -> None:
    teacher = torch.tensor([[3.0, -4.0], [100.0, 0.0]])
    student = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert distance(student, teacher).item() == pytest.approx(16 / 25 + 1.0)
    assert distance(student * 7, teacher * 7).item() == pytest.approx(16 / 25 + 1.0)
    assert distance(teacher, teacher).item() == 0


def test_the_loss_is_the_sum_of_its_parts(pair: tuple[Path, Path]) -> None:
    full, student = loaded(pair[0]), loaded(pair[1])
    given_batch = batch(9, 6)
    language, count = objective(student, full, 1.0, 0.0).loss_sum(given_batch)
    distant, _ = objective(student, full, 0.0, 1.0).loss_sum(given_batch)
    both, _ = objective(student, full, 0.5, 3.0).loss_sum(given_batch)
    assert count == 7 + 4
    assert both.item() == pytest.approx(0.5 * language.item() + 3 * distant.item(), rel=1e-5)
    with torch.no_grad(), given(student, "model.layers.2") as mine, given(full, "model.layers.4") as theirs:
        student(**given_batch.model_inputs())
        full(**given_batch.model_inputs())
    learnt = given_batch.shifted_labels_BS() != IGNORE
    s, t = mine[0][learnt].double(), theirs[0][learnt].double()
    assert distant.item() == pytest.approx(float(((t - s).pow(2).mean(-1) / t.pow(2).mean(-1)).sum()), rel=1e-4)


def test_micro_batches_add_up(pair: tuple[Path, Path]) -> None:
    full, student = loaded(pair[0]), loaded(pair[1])
    taught = objective(student, full, 1.0, 1.0)
    draw = np.random.default_rng(1)
    rows = TokenRows.of([Row(i := draw.integers(3, 28, n).astype(np.int32), i.copy()) for n in (9, 5, 7)])
    together = taught.loss_sum(collate(rows, [[0], [1], [2]], 0))
    apart = [taught.loss_sum(collate(rows, [[i]], 0)) for i in range(3)]
    assert together[1] == sum(count for _, count in apart)
    assert together[0].item() == pytest.approx(sum(loss.item() for loss, _ in apart), rel=1e-5)


def test_the_whole_middle_is_no_distance_away(pair: tuple[Path, Path]) -> None:
    full = loaded(pair[0])
    same = Distillation(loaded(pair[0]), full, *["model.layers.4"] * 2, lm_weight=0.0, kd_weight=1.0)
    assert same.loss_sum(batch(8))[0].item() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_middle_learns_and_nothing_else(pair: tuple[Path, Path], checkpointing: bool) -> None:
    from finetune.training.mode import training_mode

    full, student = loaded(pair[0]), loaded(pair[1])
    adapter = attach(student, LayersConfig(layers=[1, 2]))
    with training_mode(student, checkpointing):
        loss, count = objective(student, full, 1.0, 1.0).loss_sum(batch(9, 6))
        (loss / count).backward()
    assert {n for n, p in student.named_parameters() if p.grad is not None} == set(adapter.trainable())
    assert all(p.grad.abs().max() > 0 for p in adapter.trainable().values())
    assert all(p.grad is None for p in full.parameters())


def test_teaching_brings_the_middle_nearer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data = text_rows(tmp_path / "rows.jsonl")
    emulator = emulator_of(
        pair[0], tmp_path / "emulator", distill_steps=12, verbatim=False, data=data, lm_weight=0.0, rate=3e-3
    )
    record = json.loads((emulator / "offsite.json").read_text("utf-8"))["distilled"]
    assert record["steps"] == 12 and record["learning_rate"] == 3e-3
    told = "".join(path.read_text("utf-8") for path in emulator.glob("*.json"))
    assert str(tmp_path) not in told and str(pair[0].parent) not in told, "paths are the owner's business"
    full, given_batch = loaded(pair[0]), batch(12, 12)
    before, after = (objective(loaded(path), full, 0.0, 1.0).loss_sum(given_batch)[0] for path in (pair[1], emulator))
    assert after < 0.9 * before

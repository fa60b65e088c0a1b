"""Objectives over rows: losses and metrics by the book, pooling whatever the padding, and runs that resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_checkpoints as tasks
import torch
import training_setup as setup
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune.adapters.attach import attach
from finetune.adapters.base import Adapter
from finetune.adapters.lora import LoRAConfig
from finetune.data.batching import collate
from finetune.data.rows import IGNORE, Row, TokenRows
from finetune.errors import ConfigError
from finetune.metrics import classification_metrics, regression_metrics
from finetune.training.config import OBJECTIVES
from finetune.training.objectives.classification import ClassificationConfig
from finetune.training.objectives.regression import RegressionConfig


def model_of(family: str, outputs: int = 2) -> Any:
    import transformers

    torch.manual_seed(0)
    name = {"bert": "BertForSequenceClassification", "llama": "LlamaForSequenceClassification"}[family]
    model = getattr(transformers, name)(tasks.config(family, num_labels=outputs))
    return model.requires_grad_(False).eval()


def rows_of(family: str, count: int = 24, seed: int = 0, number: bool = False, pairs: bool = False) -> TokenRows:
    tokenizer = tasks.tokenizer(encoder=family == "bert")
    made = []
    for row in tasks.rows(count, seed=seed, pairs=pairs, number=number):
        encoded = tokenizer(row["text"], row.get("text_pair"))
        ids = np.array(encoded["input_ids"], np.int32)
        target = np.float32(row["label"]) if number else np.int64(row["label"] == "good")
        types = np.array(encoded["token_type_ids"], np.int8) if family == "bert" else None
        made.append(Row(ids, np.full(len(ids), IGNORE, np.int32), target, types))
    return TokenRows.of(made)


def adapted(model: nn.Module) -> Adapter:
    torch.manual_seed(1)
    return attach(model, LoRAConfig(rank=4, alpha=8))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_loss_is_the_sum_over_rows_each_judged_alone(family: str) -> None:
    model, rows = model_of(family, 3), rows_of(family, 7)
    objective = OBJECTIVES.build(ClassificationConfig(), model)
    loss, count = objective.loss_sum(collate(rows, [[i] for i in range(7)], pad_id=0, multiple=16))
    alone = 0.0
    for row in rows:
        types = {} if row.token_types is None else {"token_type_ids": torch.from_numpy(row.token_types).long()[None]}
        logits = model(input_ids=torch.from_numpy(row.input_ids).long()[None], **types).logits[0].double()
        alone += float(torch.logsumexp(logits, 0) - logits[int(row.target or 0)])
    assert count == 7 and loss.dtype == torch.float32
    assert float(loss) == pytest.approx(alone, rel=1e-5)


def test_regression_is_the_sum_of_squares() -> None:
    model, rows = model_of("bert", 1), rows_of("bert", 5, number=True)
    objective = OBJECTIVES.build(RegressionConfig(), model)
    batch = collate(rows, [[i] for i in range(5)], pad_id=0)
    said = model(**batch.model_inputs()).logits[:, 0]
    assert rows.targets is not None
    expected = float(((said.detach().double().numpy() - rows.targets) ** 2).sum())
    assert float(objective.loss_sum(batch)[0]) == pytest.approx(expected, rel=1e-5)


def test_a_decoder_reads_its_last_token_on_either_side_of_the_padding() -> None:
    model, ids = model_of("llama"), [7, 9, 12]
    padded = {"right": ([*ids, 0, 0], [1, 1, 1, 0, 0]), "left": ([0, 0, *ids], [0, 0, 1, 1, 1])}
    plain = model(input_ids=torch.tensor([ids])).logits
    for tokens, mask in padded.values():
        torch.testing.assert_close(
            model(input_ids=torch.tensor([tokens]), attention_mask=torch.tensor([mask])).logits, plain
        )


def test_rows_without_labels_are_refused() -> None:
    model = model_of("bert")
    batch = collate(setup.rows(2), [[0], [1]], pad_id=0)
    with pytest.raises(ConfigError, match=r"have no label: read them with data\.format=labelled"):
        OBJECTIVES.build(ClassificationConfig(), model).loss_sum(batch)


def metrics_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_run_learns_and_measures(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    result, _ = setup.run_training(
        tmp_path,
        model=model,
        adapt=adapted,
        objective=OBJECTIVES.build(ClassificationConfig(), model),
        train_rows=rows_of(family, 64),
        eval_rows=rows_of(family, 24, seed=1),
        max_steps=80,
        learning_rate=5e-3,
        eval_every=40,
    )
    measured = [line for line in metrics_of(tmp_path) if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 40, 80]
    assert set(measured[0]) == {"step", "epoch", "eval_loss", "eval_accuracy", "eval_f1", "eval_matthews"}
    assert (
        result.first_eval is not None and result.best_eval is not None and result.best_eval < 0.75 * result.first_eval
    )
    assert (result.best_metrics["accuracy"] or 0) > 0.8
    assert result.first_metrics["accuracy"] == measured[0]["eval_accuracy"]


def test_a_regression_learns(tmp_path: Path) -> None:
    model = model_of("bert", 1)
    result, _ = setup.run_training(
        tmp_path,
        model=model,
        adapt=adapted,
        objective=OBJECTIVES.build(RegressionConfig(), model),
        train_rows=rows_of("bert", 64, number=True),
        eval_rows=rows_of("bert", 24, seed=1, number=True),
        max_steps=80,
        learning_rate=5e-3,
    )
    assert result.best_eval == pytest.approx(result.best_metrics["mse"])
    assert result.best_eval is not None and result.best_eval < 0.5  # the labels' variance is 1
    assert (result.best_metrics["pearson"] or 0) > 0.8 and (result.best_metrics["spearman"] or 0) > 0.7


def test_a_run_that_is_cut_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Stopped after six of twelve steps and resumed, head and adapter end where an unbroken run ends."""

    def run(directory: Path, steps: int) -> dict[str, torch.Tensor]:
        model = model_of("llama")
        return setup.run_training(
            directory,
            model=model,
            adapt=adapted,
            objective=OBJECTIVES.build(ClassificationConfig(), model),
            train_rows=rows_of("llama", 32),
            eval_rows=rows_of("llama", 8, seed=1),
            max_steps=steps,
            eval_every=3,
            schedule="constant",
            warmup_ratio=0.0,
        )[1]

    whole = run(tmp_path / "whole", 12)
    run(tmp_path / "cut", 6)
    resumed = run(tmp_path / "cut", 12)
    assert any("score" in name for name in whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    unbroken, cut = ([line for line in metrics_of(tmp_path / name) if "eval_loss" in line] for name in ("whole", "cut"))
    assert unbroken[-1] == cut[-1]


# ---- metrics, against the formulas written out


def test_known_figures() -> None:
    """TP 3, TN 2, FP 1, FN 2."""
    targets = np.array([1, 1, 1, 1, 1, 0, 0, 0])
    predicted = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    found = classification_metrics(predicted, targets, 2)
    assert found["accuracy"] == 5 / 8 and found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews"] == pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4))


def test_one_class_alone_divides_by_nothing() -> None:
    assert classification_metrics(np.zeros(4), np.zeros(4), 2) == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_classification_metrics(classes: int, pairs: list[tuple[int, int]]) -> None:
    predicted, targets = (np.array(side) % classes for side in zip(*pairs, strict=True))
    found = classification_metrics(predicted, targets, classes)
    assert found["accuracy"] == pytest.approx(float((predicted == targets).mean()))
    scores = {}
    for c in range(classes):
        right = int(((predicted == c) & (targets == c)).sum())
        both = int((predicted == c).sum() + (targets == c).sum())
        if both:
            scores[c] = 2 * right / both
    expected = scores.get(1, 0.0) if classes == 2 else sum(scores.values()) / len(scores)
    assert found["f1"] == pytest.approx(expected)
    # Matthews as the correlation of one-hot codes (Gorodkin 2004, eq. 6)
    x, y = np.eye(classes)[predicted], np.eye(classes)[targets]
    x, y = x - x.mean(0), y - y.mean(0)
    length = math.sqrt((x * x).sum() * (y * y).sum())
    assert found["matthews"] == pytest.approx(float((x * y).sum()) / length if length > 1e-12 else 0.0, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_regression_metrics(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(side, np.float64) for side in zip(*pairs, strict=True))
    found = regression_metrics(first, second)

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    assert found["mse"] == pytest.approx(float(np.mean((first - second) ** 2)))
    varies = len(set(first)) > 1 and len(set(second)) > 1
    for name, a, b in (("pearson", first, second), ("spearman", ranks(first), ranks(second))):
        expected = float(np.corrcoef(a, b)[0, 1]) if varies else None
        assert found[name] == (None if expected is None else pytest.approx(expected, abs=1e-9))

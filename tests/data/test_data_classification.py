"""Rows with a label: what is read, how it is encoded, what is learnt of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_checkpoints as tasks
import torch

from finetune.data.batching import collate
from finetune.data.config import DataConfig
from finetune.data.label_scan import check_targets, find_classes
from finetune.data.labels import Labelling, for_labels, refuse_labels
from finetune.data.prepare import Prepared, prepare
from finetune.data.rows import IGNORE, Row, TokenRows
from finetune.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tasks.tokenizer(encoder=True)


def labelled(train: Any, **settings: Any) -> DataConfig:
    return for_labels(DataConfig(train=train, **settings), "classification")


def ready(train: Any, tokenizer: Any, labelling: Labelling, tmp_path: Path, **settings: Any) -> Prepared:
    config = labelled(train, cache_dir=str(tmp_path / "cache"), **settings)
    return prepare(config, tokenizer, context=32, seed=0, labelling=labelling)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0, 1], ("0", "1")),
        ([10, 9, 2], ("2", "9", "10")),
        (["pos", "neg", "mixed"], ("mixed", "neg", "pos")),
        ([True, False], ("false", "true")),
        ([1.0, 0.0, 2.0], ("0", "1", "2")),
        (["b", 2, "a", 10], ("2", "10", "a", "b")),
    ],
)
def test_classes_are_found_in_order(labels: list[Any], expected: tuple[str, ...]) -> None:
    assert find_classes(labelled([{"text": "a", "label": label} for label in labels])) == expected


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, 1], r"all 2 rows have the label '1': a classification needs two or more"),
        ([0.25, 1.5, 3.75], r"3 different labels are numbers such as 0\.25.*objective=regression"),
        ([0, -1, -1], r"2 of 3 rows are faulty.*'label' is -1"),
        ([0, None], r"has no label: 'label' is null"),
        ([0, [1]], r"'label' is a list"),
        ([f"name {i}" for i in range(1001)], r"1001 different labels in 1001 rows are no classes"),
    ],
)
def test_what_are_no_classes(labels: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        find_classes(labelled([{"text": "a", "label": label} for label in labels]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, r"learns labels: rows need label, text.*the first row has no 'label'"),
        ({"label": 1, "body": "a"}, r"rows need label, text.*name the columns with data.columns"),
    ],
)
def test_rows_without_a_text_or_a_label(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        find_classes(labelled([row, row]))


def test_a_label_unknown_in_eval() -> None:
    config = labelled(tasks.rows(4), eval=[{"text": "a", "label": "ugly"}, {"text": "a", "label": "good"}])
    with pytest.raises(
        DataError, match=r"data.eval: 1 of 2 rows are faulty.*'label' is 'ugly': expected one of bad, good"
    ):
        check_targets(config, Labelling(("bad", "good")))


def test_a_label_that_is_no_number() -> None:
    with pytest.raises(DataError, match=r"data.train: 1 of 2 rows are faulty.*'label' is 'high': expected a number"):
        check_targets(labelled([{"text": "a", "label": "high"}, {"text": "b", "label": 2}]), Labelling())


def test_a_class_may_be_given_by_its_number() -> None:
    labelling = Labelling(("bad", "good"))
    assert [labelling.target(text) for text in ("good", "0", "1", "bad")] == [1, 0, 1, 0]
    assert Labelling(("1", "0")).target("1") == 0  # a name goes before a number


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"packing": True}, r"data.packing=true conflicts with objective=classification"),
        ({"too_long": "split"}, r"data.too_long=split conflicts"),
        ({"format": "alpaca"}, r"data.format=alpaca conflicts.*set it to labelled"),
    ],
)
def test_settings_that_do_not_go_with_labels(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        labelled("rows.jsonl", **settings)


def test_labelled_rows_need_an_objective_for_them() -> None:
    with pytest.raises(ConfigError, match="needs objective=classification or objective=regression"):
        refuse_labels(DataConfig(train="rows.jsonl", format="labelled"))


@pytest.mark.parametrize("names", [("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis")])
def test_a_pair_is_encoded_as_the_tokenizer_does(names: tuple[str, str], tokenizer: Any, tmp_path: Path) -> None:
    rows = [dict(zip(names, pair, strict=True)) for pair in [("the film was good", "it is"), ("a plot", "not bad")] * 8]
    rows = [{**row, "label": number % 2} for number, row in enumerate(rows)]
    made = ready(rows, tokenizer, Labelling(("0", "1"), segments=True), tmp_path, eval=rows[:2])
    assert made.train.targets is not None and made.train.targets.tolist() == [0, 1] * 8
    for row, raw in zip(made.train, rows, strict=True):
        expected = tokenizer(raw[names[0]], raw[names[1]])
        assert row.input_ids.tolist() == expected["input_ids"]
        assert row.token_types is not None and row.token_types.tolist() == expected["token_type_ids"]
        assert (row.labels == IGNORE).all()


def test_texts_and_pairs_may_be_mixed_and_empty_ones_are_faulty(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "a film", "label": 0}, {"text": "a film", "text_pair": "it is", "label": 1}]
    made = ready(rows, tokenizer, Labelling(("0", "1")), tmp_path, eval=rows)
    assert [row.input_ids.tolist() for row in made.train] == [
        tokenizer("a film").input_ids,
        tokenizer("a film", "it is").input_ids,
    ]
    decoder = tasks.tokenizer(encoder=False)
    with pytest.raises(DataError, match="the text is empty"):
        ready([*rows, {"text": "", "label": 1}], decoder, Labelling(("0", "1")), tmp_path, eval=rows)


@pytest.mark.parametrize("policy", ["truncate", "drop", "error"])
def test_rows_that_are_too_long(policy: str, tokenizer: Any, tmp_path: Path) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    rows = [{"text": "film " * 9, "text_pair": "it is", "label": 0}, {"text": "good", "label": 1}]
    settings = {"max_length": 8, "too_long": policy, "eval": rows[1:]}
    if policy == "error":
        with pytest.raises(DataError, match=r"the row has 14 tokens and data.max_length is 8"):
            ready(rows, tokenizer, Labelling(("0", "1"), segments=True), tmp_path, **settings)
        return
    made = ready(rows, tokenizer, Labelling(("0", "1"), segments=True), tmp_path, **settings)
    assert made.report.train.too_long == 1
    first = made.train[0]
    if policy == "drop":
        assert len(made.train) == 1 and first.target == 1
    else:  # the longer of the two loses, and both separators stay
        assert first.input_ids.tolist() == tokenizer("film film film", "it is").input_ids
        assert first.token_types is not None and first.token_types.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.backend_tokenizer.to_str() == before


def test_columns_and_a_template(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"review": "good", "stars": 2, "film": "a"}, {"review": "bad", "stars": 1, "film": "the"}] * 4
    named = ready(
        rows, tokenizer, Labelling(("1", "2")), tmp_path, eval=rows, columns={"text": "review", "label": "stars"}
    )
    assert named.train[0].input_ids.tolist() == tokenizer("good").input_ids and named.train[0].target == 1
    written = ready(
        rows,
        tokenizer,
        Labelling(("1", "2")),
        tmp_path,
        eval=rows,
        columns={"label": "stars"},
        template="{film} film {review}",
    )
    assert written.train[1].input_ids.tolist() == tokenizer("the film bad").input_ids


def test_the_cache_gives_back_targets_and_types(tokenizer: Any, tmp_path: Path) -> None:
    rows = tasks.rows(24, pairs=True, number=True)
    first = ready(rows, tokenizer, Labelling(segments=True), tmp_path)
    again = ready(rows, tokenizer, Labelling(segments=True), tmp_path)
    other = ready(rows, tokenizer, Labelling(segments=False), tmp_path)
    assert again.report.cached and not other.report.cached and other.train.token_types is None
    for side in ("train", "eval"):
        mine, theirs = getattr(first, side), getattr(again, side)
        assert mine.targets.dtype == np.float32 and np.array_equal(mine.targets, theirs.targets)
        assert np.array_equal(mine.token_types, theirs.token_types)
    assert "standard deviation" in first.report.labels
    assert {sample.reference for sample in again.prompts} <= {"1.5", "-0.5"}
    assert again.prompts[0].token_types


def test_a_batch_carries_them_and_no_positions(tokenizer: Any, tmp_path: Path) -> None:
    rows = tasks.rows(6, pairs=True)
    made = ready(rows, tokenizer, Labelling(("bad", "good"), segments=True), tmp_path, eval=rows)
    batch = collate(made.train, [[4], [1]], pad_id=0, multiple=16).to("cpu")
    assert batch.targets_B is not None and batch.targets_B.tolist() == [1, 0] and batch.targets_B.dtype == torch.int64
    inputs = batch.model_inputs()
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert (inputs["token_type_ids"] <= inputs["attention_mask"]).all()  # type: ignore[operator]


def test_rows_of_tokens_are_what_they_were() -> None:
    rows = TokenRows.of([Row(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))])
    batch = collate(rows, [[0]], pad_id=0)
    assert rows.targets is None and rows.token_types is None and batch.targets_B is None
    assert set(batch.model_inputs()) == {"input_ids", "position_ids", "use_cache", "attention_mask"}


def test_a_file_of_labelled_rows_is_plain_text_to_others(tmp_path: Path, tokenizer: Any) -> None:
    """A label beside a text is learnt only where an objective asks for it."""
    from finetune.data.sources import recognise_all, resolve

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, tasks.rows(3))), "utf-8")
    sources = resolve(str(path), "data.train")
    assert recognise_all(DataConfig(train=str(path)), sources)[0].name == "text"
    assert recognise_all(labelled(str(path)), sources)[0].name == "labelled"

"""A base opened for a task: what is new, what is left out, what is refused, and that all storages serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import task_checkpoints as tasks
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ConfigError, ModelError, UserError
from finetune.model.config import ModelConfig
from finetune.model.load import Loaded, load, skeleton
from finetune.model.task import Task, named_classes
from finetune.model.task_head import reads_segments, refuse_bidirectional
from finetune.quant.base import QUANTIZERS
from finetune.quant.dense import DenseConfig
from finetune.quant.nf4 import NF4Config
from finetune.structure import inspect

TASK = Task("classification", ("bad", "good"))


def opened(directory: Path, task: Task = TASK, quant: Any = None, seed: int = 0) -> Loaded:
    torch.manual_seed(seed)
    return load(ModelConfig(path=str(directory)), quant or DenseConfig(), torch.float32, "cpu", task)


def rewritten(directory: Path, change: Any) -> Path:
    """The checkpoint with its tensors changed."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("classification", ()), ("classification", ("a",)), ("regression", ("a", "b")), ("seq2sec", ())],
)
def test_tasks_that_make_no_sense(kind: str, labels: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        Task(kind, labels)


@pytest.mark.parametrize(("family", "head"), [("bert", "classifier"), ("llama", "score")])
def test_a_new_head_comes_from_the_seed(family: str, head: str, tmp_path: Path) -> None:
    base = tasks.plain_base(tmp_path, family)
    first, again, other = opened(base), opened(base, quant=NF4Config()), opened(base, seed=1)
    weights = [item.model.get_submodule(head).weight for item in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.1 < float(weights[0].std()) < 0.3  # the family's own spread: initializer_range is 0.2
    assert inspect(first.model).task_head == (head,)
    assert any(f"{head} of the sequence classifier is new" in note for note in first.notes)
    assert first.model.config.id2label == {0: "bad", 1: "good"}
    assert first.model.config.pad_token_id == first.pad_id == first.tokenizer.pad_token_id


def test_the_rest_is_the_checkpoint(tmp_path: Path) -> None:
    """The encoder of the classifier computes what stock transformers computes of the same files."""
    from transformers import AutoModel

    base = tasks.plain_base(tmp_path, "bert")
    loaded, stock = opened(base), AutoModel.from_pretrained(base)
    ids = loaded.tokenizer("the film was good", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.bert(**ids).pooler_output, stock(**ids).pooler_output)


def test_a_pooler_that_is_missing_is_new_and_trains(tmp_path: Path) -> None:
    base = tasks.write_base(tmp_path, "bert", "BertForMaskedLM")
    loaded = opened(base)
    assert inspect(loaded.model).task_head == ("classifier", "bert.pooler")
    assert any("cls of the checkpoint is left out" in note for note in loaded.notes)
    dense = loaded.model.bert.pooler.dense
    assert 0.1 < float(dense.weight.std()) < 0.3 and not bool(dense.bias.any())


def test_embeddings_stored_as_the_head_they_are_tied_to(tmp_path: Path) -> None:
    base = tasks.plain_base(tmp_path, "llama", tie_word_embeddings=True)
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    loaded = opened(rewritten(base, rename))
    assert torch.equal(loaded.model.model.embed_tokens.weight, table)
    assert loaded.key_mapping == {r"^lm_head\.weight$": "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("bert", lambda t: t.pop("encoder.layer.1.output.dense.weight"), r"missing: bert.encoder.layer.1.output.dense"),
        ("bert", lambda t: t.pop("pooler.dense.bias"), r"missing: bert.pooler.dense.bias"),
        ("bert", lambda t: t.update({"encoder.layer.2.output.dense.weight": torch.ones(1)}), r"unexpected: .*layer.2"),
        ("llama", lambda t: t.pop("model.norm.weight"), r"missing: model.norm.weight"),
        ("llama", lambda t: t.update({"model.layers.0.mlp.extra": torch.ones(1)}), r"unexpected: model.layers.0.mlp"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_all_the_same(family: str, change: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        opened(rewritten(tasks.plain_base(tmp_path, family), change))


def test_a_head_that_is_there_is_kept(tmp_path: Path) -> None:
    base = tasks.write_base(tmp_path, "bert", "BertForSequenceClassification", id2label={0: "bad", 1: "good"})
    loaded = opened(base)
    assert torch.equal(loaded.model.classifier.weight, load_file(base / "model.safetensors")["classifier.weight"])
    assert not any("is new" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("told", "task", "words"),
    [
        ({0: "x", 1: "y", 2: "z"}, TASK, r"of 3 outputs \(x, y, z\), but data.train has 2 classes \(bad, good\)"),
        ({0: "x", 1: "y"}, TASK, r"has a head of 2 outputs \(x, y\), but data.train has 2 classes \(bad, good\)"),
        ({0: "x", 1: "y"}, Task("regression"), r"a head of 2 outputs \(x, y\), but data.train has one number a row"),
    ],
)  # fmt: skip
def test_a_head_for_other_classes(told: dict[int, str], task: Task, words: str, tmp_path: Path) -> None:
    base = tasks.write_base(tmp_path, "bert", "BertForSequenceClassification", id2label=told)
    with pytest.raises(ModelError, match=words):
        skeleton(ModelConfig(path=str(base)), task)
    with pytest.raises(ModelError, match=words):
        opened(base, task)


@pytest.mark.parametrize(
    ("found", "told", "expected"),
    [
        (("0", "1"), {"0": "bad", "1": "good"}, ("bad", "good")),  # numbers stand for the names
        (("bad", "good"), {"0": "good", "1": "bad"}, ("good", "bad")),  # the head's order counts
        (("0", "1"), {"0": "LABEL_0", "1": "LABEL_1"}, ("0", "1")),  # placeholders name nothing
        (("0", "1"), {"0": "a", "1": "b", "2": "c"}, ("0", "1")),
        (("ugly", "good"), {"0": "bad", "1": "good"}, ("ugly", "good")),
        (("0", "1"), None, ("0", "1")),
    ],
)
def test_the_order_of_classes(found: tuple[str, ...], told: dict[str, str] | None, expected: tuple[str, ...]) -> None:
    assert named_classes(found, {} if told is None else {"id2label": told}) == expected


@pytest.mark.parametrize("name", sorted(QUANTIZERS.types()))
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_storage_serves(name: str, family: str, tmp_path: Path) -> None:
    base = tasks.plain_base(tmp_path, family)
    config = QUANTIZERS.type_of(name)()
    if hasattr(config, "group_size"):
        config.group_size = 32
    loaded = opened(base, quant=config)
    ids = loaded.tokenizer(["the film was good", "bad"], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = loaded.model(**ids).logits
    assert logits.shape == (2, 2) and bool(logits.isfinite().all())


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    base = tasks.write_base(tmp_path, "bert", "BertForMaskedLM")
    with pytest.raises(ModelError, match=r"is an encoder.*objective=classification or objective=regression"):
        refuse_bidirectional(skeleton(ModelConfig(path=str(base))), "model.path=x")
    decoder = tasks.plain_base(tmp_path / "llama", "llama")
    refuse_bidirectional(skeleton(ModelConfig(path=str(decoder))), "model.path=x")


def test_who_reads_token_types(tmp_path: Path) -> None:
    reads = {
        family: reads_segments(opened(tasks.plain_base(tmp_path / family, family)).model)
        for family in ("bert", "llama")
    }
    assert reads == {"bert": True, "llama": False}


def test_a_family_without_such_a_model(tmp_path: Path) -> None:
    base = tasks.plain_base(tmp_path / "base", "bert")
    changed = shutil.copytree(base, tmp_path / "changed")
    raw = json.loads((changed / "config.json").read_text("utf-8"))
    (changed / "config.json").write_text(json.dumps({**raw, "model_type": "clip_text_model"}), "utf-8")
    with pytest.raises(ModelError, match="which is no sequence classifier"):
        skeleton(ModelConfig(path=str(changed)), TASK)


# ---- from the command line, before any weight is read


def checked(*overrides: str) -> None:
    from finetune.checks import check
    from finetune.compose import compose_config
    from finetune.config import to_run_config

    root = Path(__file__).parents[2]
    check(to_run_config(compose_config(["export.formats=[]", *overrides], root / "conf")))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return tasks.plain_base(tmp_path / "base", "bert")


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(path)


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_a_few_words_are_enough(objective: str, encoder: Path, tmp_path: Path) -> None:
    from finetune.compose import compose_config

    rows = written(tmp_path / "rows.jsonl", tasks.rows(8, number=objective == "regression"))
    words = [f"objective={objective}", f"model.path={encoder}", f"data.train={rows}"]
    checked(*words)
    tree = compose_config(words, Path(__file__).parents[2] / "conf")
    assert not tree.data.packing and tree.train.batch_size == 16


@pytest.mark.parametrize(
    ("overrides", "rows", "words"),
    [
        (["objective=classification"], [{"text": "a"}], r"learns labels: rows need label, text"),
        (["objective=classification"], [{"text": "a", "label": 1}] * 3, r"all 3 rows have the label '1'"),
        (["objective=classification", "data.packing=true"], [], r"data.packing=true conflicts with objective=classif"),
        (["objective=regression"], [{"text": "a", "label": "much"}], r"'label' is 'much': expected a number"),
        (["objective=sft", "data=pydocs"], [{"text": "a"}], r"is an encoder.*objective=classification or"),
        (["objective=sft", "data.format=labelled"], [{"text": "a", "label": 1}], r"needs objective=classification"),
        (["objective=classification"], None, r"pydocs: .*learns labels"),
    ],
)
def test_mistakes(
    overrides: list[str], rows: list[dict[str, Any]] | None, words: str, encoder: Path, tmp_path: Path
) -> None:
    given = [] if rows is None else [f"data.train={written(tmp_path / 'rows.jsonl', rows or [{'text': 'a'}])}"]
    with pytest.raises(UserError, match=words) as caught:
        checked(*overrides, *given, f"model.path={encoder}")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_head_for_other_classes_from_the_command_line(tmp_path: Path) -> None:
    base = tasks.write_base(tmp_path / "base", "bert", "BertForSequenceClassification", num_labels=3)
    rows = written(tmp_path / "rows.jsonl", tasks.rows(8))
    with pytest.raises(UserError, match=r"has a head of 3 outputs, but data.train has 2 classes \(bad, good\)"):
        checked("objective=classification", f"model.path={base}", f"data.train={rows}")

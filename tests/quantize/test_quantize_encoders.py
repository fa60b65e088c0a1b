"""`finetune quantize` of encoders, classifiers, and encoders with a decoder: what is read, measured and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from quantize_models import run
from task_checkpoints import SPECIAL, WORDS, rows, tokenizer, write_base

import finetune as ft
from finetune.errors import ConfigError, DataError, ModelError, UserError
from finetune.model.held import candidates

GPTQ = ("quant=int4", "quant.group_size=32", "calibrator=gptq")


def lines(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled rows, as a file."""
    return lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows(60))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return write_base(tmp_path_factory.mktemp("cls") / "base", "bert", "BertForSequenceClassification", **names)


def loss_of(model: Any, found: list[dict[str, Any]], read: Any) -> tuple[float, float]:
    """Mean cross entropy and accuracy, one row at a time."""
    losses, right = [], 0
    for row in found:
        target = torch.tensor([["bad", "good"].index(row["label"])])
        with torch.no_grad():
            logits = model(**read(row["text"], return_tensors="pt")).logits.float()
        losses.append(float(F.cross_entropy(logits, target)))
        right += int(logits.argmax() == target)
    return sum(losses) / len(losses), right / len(found)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_is_measured_by_its_classes(family: str, texts: Path, tmp_path: Path, capsys: Any) -> None:
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    kind = {"bert": "BertForSequenceClassification", "llama": "LlamaForSequenceClassification"}[family]
    base = write_base(tmp_path / "base", family, kind, **names)
    held_out = rows(40, seed=5)
    told = run(base, texts, tmp_path / "out", *GPTQ, f"data.eval={lines(tmp_path / 'dev.jsonl', held_out)}")
    said = capsys.readouterr().out
    assert "held in memory" not in said and "accuracy" in said
    stock = getattr(transformers, kind).from_pretrained(base, dtype=torch.float32).eval()
    read, quality = tokenizer(encoder=family == "bert"), told["quality"]
    loss, accuracy = loss_of(stock, held_out, read)
    assert quality["loss_dense"] == pytest.approx(loss, rel=1e-5) and quality["rows"] == 40
    assert quality["accuracy_dense"] == pytest.approx(accuracy)
    ours, _ = ft.load(
        str(tmp_path / "out"), task=ft.Task("classification", ("bad", "good")), dtype="fp32", device="cpu"
    )
    loss, accuracy = loss_of(ours, held_out, read)
    assert quality["loss"] == pytest.approx(loss, rel=1e-4) and quality["accuracy"] == pytest.approx(accuracy)
    assert sum(layer["error"] for layer in told["layers"]) < 0.9 * sum(layer["error_rtn"] for layer in told["layers"])
    head = "classifier" if family == "bert" else "score"
    assert torch.equal(ours.get_submodule(head).weight, stock.get_submodule(head).weight)  # stays as it is


def test_without_labels_the_two_models_are_compared_with_each_other(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = lines(tmp_path / "plain.jsonl", [{"text": row["text"]} for row in rows(40)])
    quality = run(classifier, plain, tmp_path / "out", "quant=w8a8")["quality"]
    assert quality.keys() == {"rows", "kl_mean", "kl_p99", "top1_agreement"} and quality["kl_mean"] > 0
    assert "without labels" in capsys.readouterr().out


def test_pairs_by_glues_names_and_a_regressor(tmp_path: Path) -> None:
    """Rows that are nothing but labelled are known by themselves; numbers have an error, and no angle."""
    base = write_base(tmp_path / "base", "bert", "BertForSequenceClassification", num_labels=1)
    made = [
        {"sentence1": row["text"], "sentence2": row["text_pair"], "label": 0.5} for row in rows(40, pairs=True, seed=3)
    ]
    told = run(base, lines(tmp_path / "rows.jsonl", made), tmp_path / "out", "quant=int8g", "quant.group_size=32")
    assert told["holds"] == "regression" and told["quality"].keys() == {"positions", "relative_error"}
    assert 0 < told["quality"]["relative_error"] < 0.1 and told["calibration_tokens"] > 36 * 8


def test_a_bare_encoder_is_measured_by_hidden_states_and_is_a_base(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", "bert", "BertModel")
    held_out = lines(tmp_path / "dev.jsonl", rows(20, seed=5))
    quality = run(base, texts, tmp_path / "out", *GPTQ, f"data.eval={held_out}")["quality"]
    assert "held in memory" not in capsys.readouterr().out
    dense = transformers.BertModel.from_pretrained(base, dtype=torch.float32).eval()
    ours, _ = ft.load(str(tmp_path / "out"), task=ft.Task("classification", ("a", "b")), dtype="fp32", device="cpu")
    error = size = 0.0
    for row in rows(20, seed=5):
        fed = tokenizer(encoder=True)(row["text"], return_tensors="pt")
        with torch.no_grad():
            before, after = dense(**fed).last_hidden_state, ours.bert(**fed).last_hidden_state
        error, size = error + float((after - before).pow(2).sum()), size + float(before.pow(2).sum())
    assert quality["relative_error"] == pytest.approx((error / size) ** 0.5, rel=1e-3)
    assert 0.9 < quality["cosine"] < 1
    adapter = ft.attach(ours, ft.LoRAConfig(rank=2))
    ours(**tokenizer(encoder=True)("good film", return_tensors="pt"), labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.trainable().values())


def t5(directory: Path, kind: str = "T5ForConditionalGeneration") -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=len(SPECIAL) + len(WORDS),
        decoder_start_token_id=0, initializer_factor=4.0,
    )  # fmt: skip
    getattr(transformers, kind)(config).save_pretrained(directory)
    tokenizer(encoder=False).save_pretrained(directory)
    return directory


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": row["text"], "completion": row["text"].split()[0]} for row in rows(count, seed)]


def test_an_encoder_and_its_decoder_are_calibrated_in_turn(tmp_path: Path) -> None:
    base, held_out = t5(tmp_path / "base"), pairs(12, seed=5)
    text, dev = lines(tmp_path / "rows.jsonl", pairs(40)), lines(tmp_path / "dev.jsonl", held_out)
    told = run(base, text, tmp_path / "out", *GPTQ, f"data.eval={dev}")
    assert sum(layer["error"] for layer in told["layers"]) < 0.9 * sum(layer["error_rtn"] for layer in told["layers"])
    assert {layer["name"].partition(".")[0] for layer in told["layers"]} == {"encoder", "decoder"}
    read = tokenizer(encoder=False)
    for model, key in (
        (transformers.T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32), "loss_dense"),
        (ft.load(str(tmp_path / "out"), task=ft.Task("seq2seq"), dtype="fp32", device="cpu")[0], "loss"),
    ):
        total = count = 0
        for row in held_out:
            labels = torch.tensor([[*read(row["completion"])["input_ids"], read.eos_token_id]])
            with torch.no_grad():
                loss = model.eval()(**read(row["prompt"], return_tensors="pt"), labels=labels).loss
            total, count = total + float(loss) * labels.numel(), count + labels.numel()
        assert told["quality"][key] == pytest.approx(total / count, rel=1e-4) and told["quality"]["tokens"] == count


def test_a_checkpoint_is_opened_with_all_the_heads_that_it_has(texts: Path, tmp_path: Path) -> None:
    """BERT's published checkpoints name the masked model and hold a pooler and a second head besides."""
    base = write_base(tmp_path / "base", "bert", "BertForPreTraining")
    path = base / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"architectures": ["BertForMaskedLM"]}
    path.write_text(json.dumps(config), "utf-8")
    run(base, texts, tmp_path / "out", "quant=nf4")
    told = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert told["architectures"] == ["BertForPreTraining"]
    ours, _ = ft.load(str(tmp_path / "out"), task=ft.Task("classification", ("a", "b")), dtype="fp32", device="cpu")
    dense = transformers.BertForPreTraining.from_pretrained(base)
    assert torch.equal(ours.bert.pooler.dense.weight, dense.bert.pooler.dense.weight)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, ["classification", "encoder"]),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, ["regression", "encoder"]),
        (
            {"architectures": ["BertForSequenceClassification"], "problem_type": "multi_label_classification"},
            ["encoder", "encoder"],
        ),
        ({"architectures": ["BertLMHeadModel"]}, ["causal_lm", "encoder"]),
        ({"architectures": ["BertForPreTraining"]}, ["encoder"]),
        ({"architectures": ["BertForSomethingElse"]}, ["classification", "encoder", "causal_lm"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_a_configuration_says_is_held(changes: dict[str, Any], kinds: list[str]) -> None:
    found = [held.kind for held in candidates(transformers.BertConfig(**changes))]
    assert found[: len(kinds)] == kinds


@pytest.mark.parametrize(
    ("row", "overrides", "kind", "words"),
    [
        ({"text": "good film", "label": "great"}, [], DataError, "'label' is 'great': expected one of bad, good"),
        ({"text": "good film"}, ["data.format=labelled"], DataError, "label.*text"),
        ({"review": "good film"}, [], DataError, "no format recognised: its rows have review"),
        ({"text": "   "}, [], DataError, "the text is empty"),
        ({"text": "good film"}, ["data.max_length=500"], ConfigError, "data.max_length is 500, more than the model's"),
    ],
    ids=["class", "label", "column", "empty", "length"],
)
def test_rows_that_a_classifier_cannot_read(
    row: dict[str, Any], overrides: list[str], kind: type[UserError], words: str, classifier: Path, tmp_path: Path
) -> None:
    path = lines(tmp_path / "rows.jsonl", [row] * 40)
    with pytest.raises(kind, match=words) as raised:
        run(classifier, path, tmp_path / "out", *GPTQ, *overrides)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_what_an_encoder_with_a_decoder_cannot_be_calibrated_with(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to read before its answer"):
        run(t5(tmp_path / "base"), texts, tmp_path / "out", *GPTQ)
    with pytest.raises(ModelError, match="an encoder and a decoder without their head"):
        run(t5(tmp_path / "bare", "T5Model"), texts, tmp_path / "out", *GPTQ)


def test_a_head_over_tokens_that_there_is_not(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a sequence classifier without an output head over tokens"):
        run(classifier, None, tmp_path / "out", "quant=int4", "quant.head=true")

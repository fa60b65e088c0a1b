"""`distill.steps` from the command line: what is reported, the same bytes after an end in between, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantize_models
import torch
from quantize_models import arguments, logits, run
from safetensors.torch import load_file

import finetune as ft
from finetune.cli import quantize
from finetune.errors import ConfigError
from finetune.quantize import opening
from finetune.quantize.state import State

TRAINED = ("quant=w4a8", "quant.group_size=32", "distill.steps=6", "distill.batch_tokens=256")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_models.save(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_models.text(tmp_path_factory.mktemp("text") / "rows.jsonl", rows=12)


@pytest.fixture(scope="module")
def straight(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run without an end in between, and its report."""
    output = tmp_path_factory.mktemp("straight") / "out"
    return output, run(base, text, output, *TRAINED)


def test_the_report_says_what_became_of_each_block(
    base: Path, text: Path, straight: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, record = straight
    told = record["distill"]
    assert (told["steps"], told["batch_tokens"]) == (6, 256)
    assert [block["block"] for block in told["blocks"]] == [f"model.layers.{number}" for number in range(3)]
    assert all(block["after"] < block["before"] for block in told["blocks"])
    plain = run(base, text, tmp_path / "plain", *TRAINED[:2])
    assert record["quality"]["kl_mean"] < plain["quality"]["kl_mean"] and plain["distill"]["blocks"] == []
    before, after = (load_file(where / "model.safetensors") for where in (tmp_path / "plain", path))
    norm = "model.layers.1.input_layernorm.weight"
    assert before.keys() == after.keys() and not torch.equal(before[norm], after[norm])
    model, _ = ft.load(str(path), dtype="fp32", device="cpu")
    assert torch.equal(model.model.layers[1].input_layernorm.weight, after[norm].float())
    assert logits(model).isfinite().all()


def test_it_goes_on_after_an_end_with_the_same_bytes(
    base: Path,
    text: Path,
    straight: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = State.save

    def saved(self: State, number: int, *rest: Any) -> None:
        save(self, number, *rest)
        if number == 1:
            raise MemoryError("the test says so")

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(State, "save", saved)
        run(base, text, tmp_path / "out", *TRAINED)
    with pytest.raises(ConfigError, match=r"was begun with distill\.steps=6, and now it is 7"):
        run(base, text, tmp_path / "out", *TRAINED, "distill.steps=7")
    capsys.readouterr()
    record = run(base, text, tmp_path / "out", *TRAINED)
    said = capsys.readouterr().out
    assert "going on after 2 of 3 blocks" in said and "distilled model.layers.2: error" in said
    assert "distilled 3 blocks: errors" in said
    assert record["distill"] == straight[1]["distill"]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (straight[0] / name).read_bytes()


def test_a_model_held_whole_gives_the_same_bytes(
    base: Path, text: Path, straight: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_streamed", lambda *_: "the test says so")
    record = run(base, text, tmp_path / "out", *TRAINED)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()
    assert json.dumps(record["distill"]) == json.dumps(straight[1]["distill"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("distill.steps=5",), r"distill\.steps=5 trains on text: set data\.calibration=FILE, or distill\.steps=0"),
        (("distill.rate=1",), r"distill\.rate"),
        (
            ("quant=none", "pruner=magnitude", "distill.steps=5"),
            r"quant=none has no codes, so distill\.steps has no say",
        ),
    ],
    ids=["no-text", "no-key", "no-codes"],
)
def test_settings_that_conflict_are_one_line(
    base: Path, tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        quantize(arguments(base, None, tmp_path / "out", *overrides))
    assert "\n" not in str(raised.value)


def test_groups_that_no_layer_has_are_refused_before_the_first_block(base: Path, text: Path, tmp_path: Path) -> None:
    words = r"quant\.group_size=48 does not divide the 64 inputs of a layer: expected 16, or -1 for whole rows"
    with pytest.raises(ConfigError, match=words):
        run(base, text, tmp_path / "out", "quant=w4a8", "quant.group_size=48")

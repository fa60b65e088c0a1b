"""Whole blocks in training: the gradients of plain autograd, through frozen blocks, and the words of refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters_models import dense_twin, frozen, ids, logits

from finetune.adapters.attach import attach
from finetune.adapters.emulator import Emulator, as_emulator, read_emulator
from finetune.adapters.layers import LayersConfig
from finetune.errors import ConfigError, ModelError

EMULATOR = Emulator(full="f" * 64, full_blocks=9, emulator="e" * 64, layers=(1, 1), kept=(1, 7))


@pytest.mark.parametrize(
    ("family", "quant"), [("llama", "nf4"), ("gpt2", "dense"), ("opt", "nf4"), ("mixtral", "dense")]
)
def test_gradients_are_those_of_plain_autograd(family: str, quant: str) -> None:
    """The first block's gradient passes through the second, which is frozen."""
    model, twin = frozen(family, quant), dense_twin(family, quant).double()
    adapter = attach(model, LayersConfig(layers=[0]))
    model(ids(), labels=ids(), use_cache=False).loss.backward()
    twin(ids(), labels=ids(), use_cache=False).loss.backward()
    wanted = {name: p.grad for name, p in twin.named_parameters()}
    merged_names = {name for name, _ in adapter.merged()}
    compared = 0
    for name, parameter in adapter.trainable().items():
        plain = name.replace(".trained_weight", ".weight").replace(".trained_bias", ".bias")
        plain = plain.replace(".trained_stack", "").replace(".trained.", ".")
        found, expected = parameter.grad.double(), wanted[plain]
        expected = expected.T if found.shape != expected.shape or (family == "gpt2" and found.dim() == 2) else expected
        # a key's bias without rotary positions moves all scores of a query alike: what there is, is rounding
        floor = 1e-6 * max(float(w.norm()) for w in wanted.values() if w is not None)
        assert (found - expected).norm() <= 1e-5 * expected.norm() + floor, name
        assert plain in merged_names
        compared += 1
    assert compared == sum(".0." in name for name in wanted if not name.startswith("lm_head"))


def test_negative_numbers_count_from_the_end_and_all_means_all() -> None:
    first = attach(frozen("llama"), LayersConfig(layers=[-1, 0, 1]))
    assert first.file_config()["layers"] == [0, 1]
    assert set(first.trainable()) == set(attach(frozen("llama"), LayersConfig(layers="all")).trainable())
    assert first.note == "blocks 0, 1 of 2 train in full"
    last = attach(frozen("llama", "nf4"), LayersConfig(layers=[-1]))
    assert last.note.startswith("block 1 of 2 train in full; from weights decoded")


def test_auto_reads_what_stands_beside_the_base(tmp_path: Path) -> None:
    from dataclasses import replace

    model = frozen("llama")
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(ConfigError, match=rf"adapter\.layers is auto, but {tmp_path} has no offsite\.json"):
        attach(model, LayersConfig())
    EMULATOR.write(tmp_path)
    with pytest.raises(ConfigError, match="speaks of 4 blocks and the model has 2"):
        attach(model, LayersConfig())
    replace(EMULATOR, layers=(0, 1), kept=(0,), full_blocks=2).write(tmp_path)
    adapter = attach(model, LayersConfig())
    assert {name.split(".layers.")[1][0] for name in adapter.trainable()} == {"1"}
    adapter.save(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert saved["layers"] == [1] and as_emulator(saved["offsite"], "x").full == "f" * 64
    model.config._name_or_path = "owner/name"
    with pytest.raises(ConfigError, match=r"the base has no offsite\.json on this machine"):
        attach(frozen("llama"), LayersConfig())


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("al", r"adapter\.layers is 'al': expected auto, all or a list of blocks; did you mean 'all'\?"),
        ([], r"adapter\.layers is \[\]"),
        ([0.5], r"adapter\.layers is \[0\.5\]"),
        ([True], r"adapter\.layers is \[True\]"),
        ([2], r"names block 2: the model has 2, expected -2 to 1"),
        ([-3], r"names block -3"),
    ],
)
def test_blocks_that_cannot_be(layers: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        attach(frozen("llama"), LayersConfig(layers=layers))


def test_other_blocks_are_refused(tmp_path: Path) -> None:
    attach(frozen("llama"), LayersConfig(layers=[0])).save(tmp_path)
    other = attach(frozen("llama"), LayersConfig(layers=[1]))
    with pytest.raises(ModelError, match=r"has layers \[0\], but here they are \[1\]"):
        other.load(tmp_path)
    started = frozen("llama")
    attach(started, LayersConfig(layers=[1], path=str(tmp_path)))  # the saved adapter decides
    assert torch.equal(logits(started), logits(frozen("llama")))


def test_offsite_json_of_another_version_or_none(tmp_path: Path) -> None:
    assert read_emulator(tmp_path) is None
    EMULATOR.write(tmp_path)
    assert read_emulator(tmp_path) == EMULATOR
    good = json.loads((tmp_path / "offsite.json").read_text("utf-8"))

    def said(text: str, words: str) -> None:
        (tmp_path / "offsite.json").write_text(text, "utf-8")
        with pytest.raises(ModelError, match=words):
            read_emulator(tmp_path)

    said(json.dumps(good | {"format_version": 2}), "format_version 2, newer than 1: update finetune")
    said("{", "cannot be read as JSON")
    said("[]", "has no format_version")
    said(json.dumps({k: v for k, v in good.items() if k != "kept"}), "is broken")
    said(json.dumps(good | {"kept": [9]}), "its blocks contradict one another")
    said(json.dumps(good | {"surprise": 1}), "is broken")

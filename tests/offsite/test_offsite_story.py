"""The whole of it by the commands: an owner splits, somebody else trains, the owner plugs in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from offsite_tiny import checkpoint, leaf, stock, tensors, text_rows

import finetune as ft
from finetune import cli
from finetune.adapters.layers import LayersConfig
from finetune.data.config import DataConfig
from finetune.errors import ConfigError, ModelError
from finetune.training.config import TrainConfig


def test_split_train_and_plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    base = checkpoint(tmp_path / "base")
    cut = [f"model.path={base}", "offsite.output=emulator", "offsite.layers=[1,1]", "offsite.keep=2", "device=cpu"]
    teach = ["offsite.distill_steps=2", "train.batch_size=4", "train.learning_rate=3e-2", "data.packing=false"]
    rows = [f"data.train={text_rows(tmp_path / 'rows.jsonl')}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert cli.offsite(["split", *cut, *teach, *rows]) == 0
    assert "4 of 6 blocks" in capsys.readouterr().out
    assert len(list((tmp_path / "runs" / "offsite").iterdir())) == 1

    model, tokenizer = ft.load("emulator", dtype="fp32", device="cpu")  # keep: as the owner stored it
    adapter = ft.attach(model, LayersConfig())
    settings = TrainConfig(max_steps=3, learning_rate=1e-2, gradient_checkpointing=True, batch_size=2)
    data = DataConfig(train=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), packing=True)
    result = ft.train(model, tokenizer, data, adapter, train=settings, output_dir=tmp_path / "run")
    assert result.steps == 3

    plug = ["plug", f"model.path={base}", f"adapter.path={tmp_path / 'run' / 'adapter'}", "offsite.output=full"]
    assert cli.offsite(plug) == 0
    assert "blocks 0, 5 of 6" in capsys.readouterr().out
    before, after = tensors(base), tensors(tmp_path / "full")
    changed = {leaf(name, "layers") for name in before if not torch.equal(before[name], after[name])}
    assert changed == {0, 5}
    assert torch.isfinite(stock(tmp_path / "full")(torch.tensor([[4, 5, 6]])).logits).all()
    with pytest.raises(ConfigError, match="exists already"):
        cli.offsite(plug)
    with pytest.raises(ModelError, match="trained on an emulator of"):
        cli.offsite([*plug[:1], "model.path=embedded", *plug[2:3], "offsite.output=other"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], r"finetune offsite \(nothing\): expected split or plug"),
        (["plgu"], r"finetune offsite plgu: expected split or plug; did you mean 'plug'\?"),
        (["split", "offsite.kep=3"], r"unknown key 'offsite\.kep'; did you mean 'keep'\?"),
        (["split", "offsite.layers=[a,1]"], r"offsite\.layers"),
        (["split", "offsite.layers=3"], r"offsite\.layers"),
        (["split"], r"offsite\.output is not set"),
        (["split", "offsite.output=x", "model.path=/nowhere/at/all"], r"model\.path=/nowhere/at/all does not exist"),
        (["split", "offsite.output=x", "data.train=nowhere.jsonl"], r"nowhere\.jsonl"),
    ],
)
def test_mistakes_are_named_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.errors import UserError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        cli.offsite(arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []

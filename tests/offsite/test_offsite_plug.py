"""What comes back is put in its place, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from offsite_tiny import FAMILIES, checkpoint, copy_of, emulator_of, job, logits, stock, tensors
from safetensors.torch import load_file, save_file

from finetune.adapters.attach import attach
from finetune.adapters.layers import LayersConfig
from finetune.adapters.provenance import write_provenance
from finetune.errors import ConfigError, ModelError
from finetune.export.adapter import save_adapter
from finetune.model.config import ModelConfig
from finetune.model.load import load
from finetune.offsite.plug import plug
from finetune.quant.keep import KeepConfig
from finetune.structure import inspect


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The full model and its emulator."""
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for family in FAMILIES:
        base = checkpoint(root / family, family)
        found[family] = base, emulator_of(base, root / f"{family}-emulator")
    return found


def trained(emulator: Path, directory: Path, moved: float = 0.0, **settings: Any) -> Path:
    """An adapter of an emulator, as a run saves it."""
    loaded = load(ModelConfig(path=str(emulator)), KeepConfig(), torch.bfloat16, "cpu")
    adapter = attach(loaded.model, LayersConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(moved * torch.randn(parameter.shape, generator=generator))
    save_adapter(adapter, loaded, directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_untouched_blocks_give_the_full_model_bit_for_bit(
    family: str, bases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, emulator = bases[family]
    assert plug(job(base, tmp_path / "out"), str(trained(emulator, tmp_path / "adapter"))) == 0
    wanted, found = tensors(base), tensors(tmp_path / "out")
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert wanted[name].dtype == found[name].dtype
        assert torch.equal(wanted[name].view(torch.uint8), found[name].view(torch.uint8)), name
    assert torch.equal(logits(stock(tmp_path / "out")), logits(stock(base)))


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_blocks_stand_at_their_places(family: str, bases: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """The oracle is stock transformers with the emulator's two trained blocks copied over the full model's."""
    base, emulator = bases[family]
    directory = trained(emulator, tmp_path / "adapter", moved=0.05)
    plug(job(base, tmp_path / "out"), str(directory))
    tuned = emulator_with(emulator, directory)
    full = stock(base)
    theirs, ours = inspect(tuned).blocks, inspect(full).blocks
    for mine, other in ((0, 0), (5, 3)):
        full.get_submodule(ours[mine]).load_state_dict(tuned.get_submodule(theirs[other]).state_dict())
    found = stock(tmp_path / "out")
    assert torch.equal(logits(found), logits(full))
    assert not torch.equal(logits(found), logits(stock(base)))


def emulator_with(emulator: Path, adapter: Path) -> Any:
    """Stock transformers' emulator with the saved tensors copied in by their names."""
    model = stock(emulator)
    own = dict(model.named_parameters())
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        for ours, theirs in (("trained_weight", "weight"), ("trained_bias", "bias"), (".trained_stack", "")):
            name = name.replace(ours, theirs)
        target = own[name].data
        # a Conv1D is [I, O]; the saved weight is [O, I]
        target.copy_(tensor if "trained_weight" not in key or not is_conv1d(model, name) else tensor.T)
    return model


def is_conv1d(model: Any, name: str) -> bool:
    return hasattr(model.get_submodule(name.rpartition(".")[0]), "nf")


def test_what_comes_back_holds_the_trained_blocks_alone(bases: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    directory = trained(bases["llama"][1], tmp_path / "adapter")
    keys = load_file(directory / "adapter_model.safetensors")
    assert {key.split(".layers.")[1].split(".")[0] for key in keys} == {"0", "3"}
    wanted = {n for n, _ in stock(bases["llama"][1]).named_parameters() if ".layers.0." in n or ".layers.3." in n}
    assert len(keys) == len(wanted)


def edited(directory: Path, **changes: Any) -> str:
    path = directory / "adapter_config.json"
    document = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({k: v for k, v in (document | changes).items() if v is not None}), "utf-8")
    return str(directory)


def test_an_adapter_of_another_model_is_refused(bases: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, emulator = bases["llama"]
    other = copy_of(base, tmp_path / "other")
    found = tensors(other)
    found["model.layers.2.mlp.up_proj.weight"] += 1
    save_file(found, other / "model.safetensors", metadata={"format": "pt"})
    directory = trained(emulator, tmp_path / "adapter")
    with pytest.raises(
        ModelError, match=r"trained on an emulator of [0-9a-f]{12}, but model\.path=.*other is [0-9a-f]"
    ):
        plug(job(other, tmp_path / "out"), str(directory))
    assert not (tmp_path / "out").exists()


def test_adapters_that_are_not_of_their_emulator_are_refused(
    bases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, emulator = bases["llama"]
    directory = trained(emulator, tmp_path / "adapter")

    def refused(words: str, path: str | None) -> None:
        with pytest.raises((ConfigError, ModelError), match=words):
            plug(job(base, tmp_path / "out"), path)
        assert not (tmp_path / "out").exists()

    def copied(name: str) -> Path:
        shutil.copytree(directory, tmp_path / name)
        return tmp_path / name

    refused(r"adapter\.path is not set", None)
    refused(r"names no emulator", edited(copied("a"), offsite=None))
    refused(r"of method lora: expected layers", edited(copied("b"), finetune_method="lora"))
    refused(r"trained block 1 of the emulator, which is its middle: expected 0, 3", edited(copied("c"), layers=[0, 1]))
    refused(r"also trained lm_head", edited(copied("d"), train_also=["lm_head"]))
    swapped = copied("e")
    write_provenance(swapped, {"base": "f" * 64}, method="layers")
    refused(r"trained on weights ffffffffffff, not on the emulator [0-9a-f]{12} that it names", str(swapped))
    newer = json.loads((directory / "adapter_config.json").read_text("utf-8"))["offsite"] | {"format_version": 2}
    refused(r"offsite has format_version 2, newer than 1", edited(copied("g"), offsite=newer))
    broken = copied("h")
    found = load_file(broken / "adapter_model.safetensors")
    save_file(dict(list(found.items())[1:]), broken / "adapter_model.safetensors")
    refused(r"is missing \(expected", str(broken))

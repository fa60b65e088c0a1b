"""BitFit and norm tuning: what trains, PEFT's LN tuning both ways, what merges, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters_models import dense_twin, frozen, logits, pefts, randomize

from finetune.adapters.attach import attach
from finetune.adapters.bitfit import BitFitConfig
from finetune.adapters.norm_tuning import NormTuningConfig
from finetune.errors import ConfigError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore")
BAR = 2e-5


@pytest.mark.parametrize(("family", "projections", "norms"), [("gpt2", 8, 5), ("opt", 12, 5)])
def test_bitfit_trains_every_bias_there_is(family: str, projections: int, norms: int) -> None:
    model = frozen(family, "nf4")
    there = {name.replace(".base.", ".") for name, _ in model.named_parameters() if name.endswith("bias")}
    adapter = attach(model, BitFitConfig())
    keys = {key.removeprefix("base_model.model.") for key in adapter.file_keys()}
    assert keys == there and len(keys) == projections + norms
    assert adapter.mergeable and adapter.obstacle == ""
    assert adapter.note == (
        f"bitfit trains {projections + norms} biases: {projections} of projections (0 of them new ones, from zero),"
        f" {norms} of norms"
    )
    assert set(dict(adapter.merged())) == there


def test_new_biases_do_not_merge_and_say_why() -> None:
    model = frozen("llama")
    with pytest.raises(ConfigError, match=r"the model has no biases; adapter.bias=all adds some, from zero"):
        attach(model, BitFitConfig())
    adapter = attach(model, BitFitConfig(bias="all", targets=["q_proj", "v_proj"]))
    assert not adapter.mergeable
    assert adapter.obstacle == "the layout of the base has no bias for q_proj, v_proj"
    assert len(adapter.trainable()) == 4


def test_experts_are_left_out_and_named() -> None:
    adapter = attach(frozen("mixtral"), BitFitConfig(bias="all"))
    assert "stacked experts (down_proj, gate_up_proj) have no place for one" in adapter.note
    assert all("experts" not in name for name in adapter.trainable())
    with pytest.raises(ConfigError, match="cannot adapt stacked experts such as"):
        attach(frozen("mixtral"), BitFitConfig(bias="all", targets=["experts.down_proj"]))


def test_a_saved_bitfit_brings_its_structure(tmp_path: Path) -> None:
    model = frozen("opt")
    adapter = attach(model, BitFitConfig(targets=["fc1"], norms=False, train_also=["final_layer_norm"]))
    randomize(adapter)
    adapter.save(tmp_path)
    other = frozen("opt")
    attach(other, BitFitConfig(path=str(tmp_path)))
    assert torch.equal(logits(other), logits(model))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    for broken, words in (({"bias": 3}, "adapter.bias is 3"), ({"targets": "x"}, "adapter.targets is 'x'")):
        path.write_text(json.dumps(saved | broken))
        with pytest.raises(ModelError, match=words):
            attach(frozen("opt"), BitFitConfig(path=str(tmp_path)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_norm_tuning_trains_the_norms(family: str) -> None:
    model = frozen(family)
    vectors = {name for name, p in model.named_parameters() if p.dim() == 1 and ("norm" in name or "ln_" in name)}
    adapter = attach(model, NormTuningConfig())
    found = {name.replace(".trained.", ".") for name in adapter.trainable()}
    assert found == vectors and found
    assert set(dict(adapter.merged())) == vectors


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"train_also": ["lm_head"]}], ids=["norms", "head"])
def test_stock_peft_gives_our_logits(family: str, settings: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if settings and family != "llama":
        pytest.skip("its head is tied")
    model = frozen(family, "nf4")
    adapter = attach(model, NormTuningConfig(**settings))
    randomize(adapter)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(dense_twin(family, "nf4"), str(tmp_path)).eval()
    assert (logits(theirs) - logits(model)).abs().max() <= BAR
    assert (logits(theirs.merge_and_unload()) - logits(model)).abs().max() <= BAR


@pytest.mark.parametrize("targets", [None, ["input_layernorm"], r".*\.1\..*norm"], ids=["default", "list", "regex"])
def test_pefts_adapters_load_here(targets: list[str] | str | None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = pefts(dense_twin("llama"), peft.LNTuningConfig(target_modules=targets), tmp_path, size=0.2)
    model = frozen("llama")
    attach(model, NormTuningConfig(path=str(tmp_path)))
    assert (logits(model) - logits(theirs)).abs().max() <= BAR


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'input_layernrm' matches no norm of the model;.*did you mean 'input_"):
        attach(frozen("llama"), NormTuningConfig(targets=["input_layernrm"]))
    with pytest.raises(ConfigError, match=r"adapter.targets names model.decoder.*, which has no bias"):
        model = frozen("opt")
        model.model.decoder.layers[0].fc1.bias = None
        attach(model, BitFitConfig(targets=["fc1"]))
    with pytest.raises(ConfigError, match=r"adapter.bias is 'al': expected existing \| all; did you mean 'all'"):
        BitFitConfig(bias="al")
    attach(frozen("llama"), NormTuningConfig()).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj", "norm"]}))
    with pytest.raises(ModelError, match=r"also adapts model.layers.0.self_attn.q_proj, which is no norm"):
        attach(frozen("llama"), NormTuningConfig(path=str(tmp_path)))

"""Houlsby and Pfeiffer: where bottlenecks sit in each family, their formula, saving, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from adapters_models import COMMON, DECODER, MOE, WIDE, frozen, frozen_or_plain, logits, randomize

from finetune.adapters.attach import attach
from finetune.adapters.bottleneck import BottleneckModule
from finetune.adapters.houlsby import HoulsbyConfig
from finetune.adapters.pfeiffer import PfeifferConfig
from finetune.checks import check_exports
from finetune.errors import ConfigError, ModelError

FAMILIES = {
    "llama": (None, "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": (None, "attn.c_proj", "mlp.c_proj"),
    "opt": (None, "self_attn.out_proj", "fc2"),
    "mixtral": (None, "self_attn.o_proj", "mlp"),
    "gpt_oss": (None, "self_attn.o_proj", "mlp"),
    "Falcon": (WIDE, "self_attention.dense", "mlp.dense_4h_to_h"),
    "Phi": (WIDE | {"intermediate_size": 96}, "self_attn.dense", "mlp.fc2"),
    "GPTNeoX": (WIDE | {"intermediate_size": 96}, "attention.dense", "mlp.dense_4h_to_h"),
    "Qwen2Moe": (COMMON | DECODER | MOE, "self_attn.o_proj", "mlp"),
}


def model_of(family: str) -> torch.nn.Module:
    return frozen_or_plain(family, FAMILIES[family][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_follows_attention_and_feedforward(family: str) -> None:
    _, attention, feedforward = FAMILIES[family]
    model = model_of(family)
    before = logits(model)
    adapter = attach(model, HoulsbyConfig(width=4, norms=False))
    assert torch.equal(logits(model), before)
    places = {name.split(".bottleneck.")[0] for name in adapter.trainable()}
    assert len(places) == 4
    assert all(name.endswith((f".{attention}", f".{feedforward}")) for name in places), places
    alone = attach(model_of(family), PfeifferConfig(width=4))
    assert {n.split(".bottleneck.")[0] for n in alone.trainable()} == {p for p in places if p.endswith(feedforward)}
    randomize(adapter)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with adapter.detached():
        assert torch.equal(logits(model), before)


def test_is_h_plus_up_of_act_of_down() -> None:
    model = frozen("opt", "nf4")
    adapter = attach(model, PfeifferConfig(width=4, activation="relu"))
    randomize(adapter)
    module = model.model.decoder.layers[0].fc2
    x = torch.randn(3, 96)
    h, b = module.base(x).double(), module.bottleneck.double()
    wanted = h + F.relu(h @ b.down_weight.T + b.down_bias) @ b.up_weight.T + b.up_bias
    assert torch.allclose(module(x).double(), wanted, atol=1e-6)


def test_houlsby_trains_the_norms() -> None:
    adapter = attach(frozen("llama"), HoulsbyConfig(width=4))
    assert sum("norm" in name for name in adapter.trainable()) == 5
    assert sum("bottleneck" in name for name in adapter.trainable()) == 16


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_saved_one_brings_its_structure(family: str, tmp_path: Path) -> None:
    model = frozen(family)
    adapter = attach(model, HoulsbyConfig(width=5, activation="tanh", targets=["layers.1.*"], train_also=["lm_head"]))
    randomize(adapter)
    adapter.save(tmp_path)
    other = frozen(family)
    attach(other, HoulsbyConfig(path=str(tmp_path)))
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ModelError, match="is of method houlsby: expected pfeiffer"):
        attach(frozen(family), PfeifferConfig(path=str(tmp_path)))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"activation": "sine"}))
    with pytest.raises(ModelError, match=r"adapter.activation is 'sine': expected relu"):
        attach(frozen(family), HoulsbyConfig(path=str(tmp_path)))
    path.write_text(json.dumps({key: value for key, value in saved.items() if key != "width"}))
    with pytest.raises(ModelError, match="has no width: expected what finetune writes for adapter=houlsby"):
        attach(frozen(family), HoulsbyConfig(path=str(tmp_path)))


def test_a_mixture_is_followed_as_a_whole() -> None:
    model = frozen("mixtral", "nf4")
    attach(model, PfeifferConfig(width=4))
    assert isinstance(model.model.layers[0].mlp, BottleneckModule)
    assert model.model.layers[0].mlp.experts.num_experts == 4


def test_refusals() -> None:
    adapter = attach(frozen("llama"), PfeifferConfig())
    words = r"safetensors cannot be written of adapter=pfeiffer: it cannot be merged, because what follows a sub-layer"
    with pytest.raises(ConfigError, match=words + r".*set export.formats=\[\]"):
        check_exports(["safetensors"], adapter)
    with pytest.raises(ConfigError, match=r"'o_proj' ends no sub-layer that adapter=pfeiffer can follow; have down_pr"):
        attach(frozen("llama"), PfeifferConfig(targets=["o_proj"]))
    with pytest.raises(ConfigError, match=r"adapter.width is 0: expected at least 1"):
        HoulsbyConfig(width=0)
    with torch.device("meta"):
        mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=96, hidden_size=64, state_size=8))
    with pytest.raises(ConfigError, match="sub-layers are not understood"):
        attach(mamba, HoulsbyConfig())

"""(IA)^3: found by structure, PEFT's layout and logits, exact merges, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters_models import dense_twin, frozen, logits, pefts, randomize

from finetune.adapters.attach import attach
from finetune.adapters.ia3 import IA3Config
from finetune.errors import ConfigError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore")
BAR = 2e-5

TENSORS = {
    "llama": {"self_attn.k_proj": (32, 1), "self_attn.v_proj": (32, 1), "mlp.down_proj": (1, 96)},
    "gpt2": {"attn.c_attn": (192, 1), "mlp.c_proj": (1, 256)},
    "opt": {"self_attn.k_proj": (64, 1), "self_attn.v_proj": (64, 1), "fc2": (1, 96)},
    "mixtral": {"self_attn.k_proj": (32, 1), "self_attn.v_proj": (32, 1)},
}


@pytest.mark.parametrize("family", TENSORS)
def test_scales_keys_values_and_intermediate_activations(family: str) -> None:
    adapter = attach(frozen(family), IA3Config())
    shapes = {name.removesuffix(".ia3_l"): tuple(p.shape) for name, p in adapter.trainable().items()}
    for name, shape in shapes.items():
        assert next(s for leaf, s in TENSORS[family].items() if name.endswith(f".{leaf}")) == shape
    assert len(shapes) == 2 * len(TENSORS[family])


@pytest.mark.parametrize("quant", ["dense", "nf4"])
@pytest.mark.parametrize("family", TENSORS)
def test_stock_peft_gives_our_logits(family: str, quant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = frozen(family, quant)
    adapter = attach(model, IA3Config(train_also=["lm_head"] if family == "llama" else []))
    randomize(adapter, 0.2)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(dense_twin(family, quant), str(tmp_path)).eval()
    mine = logits(model)
    with adapter.disabled():
        assert (mine - logits(model)).abs().max() > 0.01
    assert (logits(theirs) - mine).abs().max() <= BAR
    assert (logits(theirs.merge_and_unload()) - mine).abs().max() <= BAR


THEIRS = {
    "llama": ("llama", {}),
    "regex": ("llama", {"target_modules": r".*\.1\..*(k|down)_proj", "feedforward_modules": r".*down_proj"}),
    "head": ("llama", {"target_modules": ["q_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "all-linear": ("opt", {"target_modules": "all-linear", "feedforward_modules": ["out_proj"]}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_pefts_adapters_load_here(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    family, settings = THEIRS[case]
    theirs = pefts(dense_twin(family), peft.IA3Config(**settings), tmp_path, size=0.2)
    model = frozen(family)
    adapter = attach(model, IA3Config(path=str(tmp_path)))
    assert (logits(model) - logits(theirs)).abs().max() <= BAR
    adapter.save(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(dense_twin(family), str(tmp_path / "again")).eval()
    assert (logits(again) - logits(theirs)).abs().max() <= BAR


def test_merges_the_bias_of_a_scaled_output() -> None:
    model = frozen("opt")
    adapter = attach(model, IA3Config())
    randomize(adapter, 0.2)
    merged = dict(adapter.merged())
    key = model.model.decoder.layers[0].self_attn.k_proj
    assert torch.equal(merged["model.decoder.layers.0.self_attn.k_proj.bias"], key.base.bias * key.ia3_l.flatten())
    assert not any(name.endswith("fc2.bias") for name in merged)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("mixtral", {"targets": ["experts.down_proj"]}, "ia3 cannot adapt stacked experts such as"),
        ("llama", {"targets": ["k_prj"]}, "'k_prj' matches no projection.*did you mean 'k_proj'"),
        ("llama", {"feedforward": ["up_proj"]}, "adapter.feedforward: 'up_proj' matches no target"),
        ("llama", {"feedforward": "down_proj"}, "adapter.feedforward is 'down_proj': expected auto or a list"),
        ("llama", {"targets": "atuo"}, "adapter.targets is 'atuo': expected auto, all-linear or a list"),
    ],
)
def test_refuses_in_one_line(family: str, settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        attach(frozen(family), IA3Config(**settings))
    assert "\n" not in str(raised.value)


def test_refuses_another_side_and_another_method(tmp_path: Path) -> None:
    settings = {"targets": ["o_proj"], "feedforward": ["o_proj"]}
    attach(frozen("llama"), IA3Config(**settings)).save(tmp_path)
    other = attach(frozen("llama"), IA3Config(**settings | {"feedforward": []}))
    with pytest.raises(
        ModelError, match=r"scales the input of model.layers.0.self_attn.o_proj, but here it is the out"
    ):
        other.load(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scale_by": 3}))
    with pytest.raises(ModelError, match="sets scale_by=3, which finetune does not compute"):
        attach(frozen("llama"), IA3Config(path=str(tmp_path)))
    path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    with pytest.raises(ModelError, match="is of method LORA: expected IA3"):
        attach(frozen("llama"), IA3Config(path=str(tmp_path)))

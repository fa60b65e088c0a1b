"""Stock PEFT on whatever the model is for: the wrapper that it picks, trained heads, every setting read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters_models import bits, dense_twin, frozen, logits, pefts, randomize
from safetensors.torch import load_file, save_file

from finetune.adapters import peft_format
from finetune.adapters.attach import attach
from finetune.adapters.base import AdapterConfig
from finetune.adapters.dora import DoRAConfig
from finetune.adapters.ia3 import IA3Config
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.norm_tuning import NormTuningConfig
from finetune.errors import ConfigError, ModelError, UserError
from finetune.structure import inspect
from finetune.structure.norms import norms

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
BAR = 2e-5
WRAPPERS = {
    "bert": ("SEQ_CLS", ["classifier"]),
    "roberta": ("SEQ_CLS", ["classifier"]),
    "llama_score": ("SEQ_CLS", ["score"]),
    "t5": ("SEQ_2_SEQ_LM", None),
    "bert_mlm": ("FEATURE_EXTRACTION", None),
    "llama": ("CAUSAL_LM", None),
}
"""What PEFT is told of a model, and the modules that train beside every adapter."""
ATTENTION = {"bert": ["query", "value"], "roberta": ["query", "value"], "llama_score": ["q_proj", "v_proj"],
             "t5": ["q", "v"], "bert_mlm": ["query", "value"]}  # fmt: skip
FEEDFORWARD = {"bert": "output.dense", "roberta": "output.dense", "llama_score": "down_proj", "t5": "wo",
               "bert_mlm": "output.dense"}  # fmt: skip
METHODS = {"lora": LoRAConfig(rank=4), "dora": DoRAConfig(rank=4), "ia3": IA3Config(), "norms": NormTuningConfig()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", WRAPPERS)
def test_peft_opens_ours_by_the_wrapper_of_its_task(family: str, method: str, tmp_path: Path) -> None:
    model = frozen(family)
    adapter = attach(model, METHODS[method])
    randomize(adapter)
    adapter.save(tmp_path)
    task, whole = WRAPPERS[family]
    saved = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert (saved["task_type"], saved["modules_to_save"]) == (task, whole)
    theirs = peft.PeftModel.from_pretrained(dense_twin(family), str(tmp_path)).eval()
    assert type(theirs) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    assert (logits(theirs) - logits(model)).abs().max() <= BAR


def test_a_model_without_any_head_gives_features() -> None:
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    assert peft_format.task_type(inspect(transformers.BertModel(config))) == "FEATURE_EXTRACTION"


def theirs(family: str, config: Any, directory: Path) -> torch.nn.Module:
    """PEFT's own adapter, moved off its start and saved."""
    return pefts(dense_twin(family), config, directory)


def of_theirs(method: str, family: str) -> tuple[Any, type[AdapterConfig]]:
    task = WRAPPERS[family][0]
    if method == "ia3":
        last = FEEDFORWARD[family]
        targets = [*ATTENTION[family], last]
        return peft.IA3Config(task_type=task, target_modules=targets, feedforward_modules=[last]), IA3Config
    if method == "norms":
        first = [name for name in norms(frozen(family)) if ".0." in name]
        return peft.LNTuningConfig(task_type=task, target_modules=first), NormTuningConfig
    config = peft.LoraConfig(task_type=task, target_modules=ATTENTION[family], r=4, use_dora=method == "dora")
    return config, DoRAConfig if method == "dora" else LoRAConfig


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ATTENTION)
def test_we_open_pefts_with_its_trained_head(family: str, method: str, tmp_path: Path) -> None:
    config, mine = of_theirs(method, family)
    model = theirs(family, config, tmp_path)
    wanted = logits(model)
    ours = frozen(family)
    adapter = attach(ours, mine(path=str(tmp_path)))
    assert (logits(ours) - wanted).abs().max() <= BAR
    heads = {name.partition(".")[0] for name in adapter.trainable()} & {"classifier", "score"}
    assert bool(heads) == (WRAPPERS[family][0] == "SEQ_CLS")
    adapter.save(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(dense_twin(family), str(tmp_path / "again")).eval()
    assert (logits(again) - wanted).abs().max() <= BAR


SETTINGS = {
    "layers": {"layers_to_transform": [1]},
    "layers, by name": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "excluded by pattern": {"exclude_modules": r".*layers\.0\..*q_proj"},
    "whole": {"modules_to_save": ["embed_tokens", "norm"]},
    "biases, none": {"bias": "none"},
    "biases, all": {"bias": "all"},
    "biases, lora's": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": [1, 2]},
    "tokens, by name": {"trainable_token_indices": {"embed_tokens": [1]}},
    "activated": {"alora_invocation_tokens": [3, 4]},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
REFUSED = {
    "activated": "alora_invocation_tokens=",
    "replicated": "layer_replication=",
    "pissa": "init_lora_weights='pissa'",
}


@pytest.mark.parametrize("case", SETTINGS)
def test_every_setting_is_honoured_or_refused_by_name(case: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, **SETTINGS[case]})
    model = theirs("llama", config, tmp_path)
    ours = frozen("llama")
    if case in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[case]) as error:
            attach(ours, LoRAConfig(path=str(tmp_path)))
        assert "\n" not in str(error.value)
        return
    attach(ours, LoRAConfig(path=str(tmp_path)))
    assert (logits(ours) - logits(model)).abs().max() <= BAR


def fault(directory: Path, kind: str) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    head = next(key for key in tensors if "classifier" in key and key.endswith("weight"))
    if kind == "missing":
        del tensors[head]
    elif kind == "unexpected":
        tensors[head.replace("classifier", "score")] = tensors[head].clone()
    else:
        tensors[head] = torch.zeros(7, 64)
    save_file(tensors, path)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "expected 3 x 64"])
@pytest.mark.parametrize("mine", [LoRAConfig, IA3Config])
def test_a_head_that_does_not_fit_is_an_error(kind: str, mine: type[AdapterConfig], tmp_path: Path) -> None:
    config, _ = of_theirs("lora" if mine is LoRAConfig else "ia3", "bert")
    theirs("bert", config, tmp_path)
    fault(tmp_path, kind)
    model = frozen("bert")
    before, names = logits(model), list(model.state_dict())
    with pytest.raises(ModelError, match=kind):
        attach(model, mine(path=str(tmp_path)))
    assert list(model.state_dict()) == names, "what is refused leaves no trace"
    assert torch.equal(bits(logits(model)), bits(before))


def test_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    for family in ("llama", "bert", "gpt2"):
        adapter = attach(frozen(family), LoRAConfig(rank=4))
        adapter.save(tmp_path / family)
    for family, other in (("llama", "gpt2"), ("bert", "llama"), ("gpt2", "bert"), ("llama", "llama_score")):
        with pytest.raises(UserError, match=f"{family}") as error:
            attach(frozen(other), LoRAConfig(path=str(tmp_path / family)))
        assert isinstance(error.value, ModelError | ConfigError) and "\n" not in str(error.value)

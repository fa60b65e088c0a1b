"""What PEFT's LoRA trains beside its products: biases, rows of the token embedding, routers, layers outside blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_models import bits, dense_twin, frozen, ids, logits, pefts, task_of
from safetensors.torch import load_file, save_file

from finetune.adapters.attach import attach
from finetune.adapters.dora import DoRAConfig
from finetune.adapters.ia3 import IA3Config
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.pissa import PiSSAConfig
from finetune.adapters.several import Adapters
from finetune.combine import Source
from finetune.errors import ConfigError, ModelError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
BAR = 2e-5
QV = ["q_proj", "v_proj"]
EXACT_BIASES = tuple(int(part) for part in peft.__version__.split(".")[:2]) >= (0, 21)
"""PEFT 0.20 leaves the biases that `lora_only` means out of the file, and saves buffers with `all` (BART's)."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "all biases, head": ("phi", {"target_modules": QV, "bias": "all"}),
    "all biases, classifier": ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "all biases, pair": ("bart", {"target_modules": ["q_proj"], "bias": "all", "task_type": "SEQ_2_SEQ_LM"}),
    "own biases": ("opt", {"target_modules": QV, "bias": "lora_only"}),
    "no biases": ("llama", {"target_modules": QV, "bias": "all"}),
    "bias of B": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True}),
    "all of it": ("qwen2", {"target_modules": QV, "bias": "all", "lora_bias": True, "modules_to_save": ["norm"],
                            "trainable_token_indices": [7, 3]}),
    "dora": ("opt", {"target_modules": QV, "bias": "all", "use_dora": True, "trainable_token_indices": [7, 3]}),
    "tokens, tied": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [7, 3], "fan_in_fan_out": True}),
    "tokens, by name": ("llama", {"target_modules": QV,
                                  "trainable_token_indices": {"embed_tokens": [7], "lm_head": [3]}}),
    "tokens, scaled": ("gemma", {"target_modules": QV, "trainable_token_indices": [7, 3]}),
    "tokens, pair": ("t5", {"target_modules": ["q"], "trainable_token_indices": [7, 3], "task_type": "SEQ_2_SEQ_LM"}),
    "router": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "experts.down_proj"],
                           "rank_pattern": {"gate.weight": 3}, "use_rslora": True}),
    "parameter": ("llama", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}),
    "pooler": ("bert", {"target_modules": ["dense", "query"], "task_type": "SEQ_CLS"}),
    "scoring gate": ("qwen2_moe", {"target_modules": "all-linear"}),
    "blocks of a pair": ("t5", {"target_modules": ["q"], "layers_to_transform": [1], "task_type": "SEQ_2_SEQ_LM"}),
    "head beside a layer": ("phi", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}),
}  # fmt: skip


def theirs(family: str, settings: dict[str, Any], directory: Path, quant: str = "dense") -> torch.nn.Module:
    """PEFT's own adapter, moved off its start and saved."""
    return pefts(dense_twin(family, quant), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}), directory)


def ours(family: str, settings: dict[str, Any], directory: Path, quant: str = "dense") -> Any:
    model = frozen(family, quant)
    kind = DoRAConfig if settings.get("use_dora") else LoRAConfig
    return model, attach(model, kind(path=str(directory)))


def skip_what_is_not_saved(family: str, settings: dict[str, Any]) -> None:
    if (settings.get("bias") == "lora_only" or family == "bart") and not EXACT_BIASES:
        pytest.skip(f"PEFT {peft.__version__} does not save the biases that it trains, or others too")


@pytest.mark.parametrize("case", CASES)
def test_it_is_loaded_trained_merged_and_saved_as_peft_has_it(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    skip_what_is_not_saved(family, settings)
    stock = theirs(family, settings, tmp_path)
    wanted = logits(stock)
    before = logits(frozen(family))
    model, adapter = ours(family, settings, tmp_path)
    assert (logits(model) - wanted).abs().max() <= BAR
    with adapter.disabled():
        assert torch.equal(bits(logits(model)), bits(before))
    assert (before - wanted).abs().max() > 0.01
    adapter.save(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(dense_twin(family), str(tmp_path / "again")).eval()
    assert (logits(again) - wanted).abs().max() <= BAR
    once_more, _ = ours(family, settings, tmp_path / "again")
    assert torch.equal(bits(logits(once_more)), bits(logits(model)))
    assert adapter.mergeable
    merged = dense_twin(family)
    names = merged.state_dict().keys()
    weights = dict(adapter.merged())
    assert weights.keys() <= names
    if getattr(merged.config, "tie_word_embeddings", False) and len({*weights} & {"lm_head.weight"}):
        merged.lm_head.weight = torch.nn.Parameter(merged.lm_head.weight.detach().clone())
    merged.load_state_dict(weights, strict=False)
    assert (logits(merged) - wanted).abs().max() <= BAR


@pytest.mark.parametrize("case", ["all of it", "dora", "tokens, tied", "tokens, scaled", "router", "own biases"])
def test_every_gradient_is_pefts(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    skip_what_is_not_saved(family, settings)
    stock = theirs(family, settings, tmp_path)
    model, adapter = ours(family, settings, tmp_path)
    assert task_of(model) == "CausalLM"
    for one in (stock, model):
        one(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    wanted = {name.replace(".default", "").replace(".modules_to_save", ""): p for name, p in stock.named_parameters()}
    wanted = {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in wanted.items()}
    found = adapter.file_keys()
    assert {id(p) for p in found.values()} == {id(p) for p in adapter.trainable().values()}
    for key, parameter in found.items():
        scale = wanted[key].grad.norm()  # nothing, but for rounding, at the bias of a key without rotation
        assert (parameter.grad - wanted[key].grad).norm() <= 1e-5 * scale + 1e-7, key
    assert {name for name, p in wanted.items() if p.requires_grad} == {*found}


@pytest.mark.parametrize("case", ["all of it", "router", "own biases", "pooler"])
def test_on_a_packed_base(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    skip_what_is_not_saved(family, settings)
    wanted = logits(theirs(family, settings, tmp_path, "nf4"))
    model, adapter = ours(family, settings, tmp_path, "nf4")
    assert (logits(model) - wanted).abs().max() <= BAR
    adapter.unmount()
    assert torch.equal(bits(logits(model)), bits(logits(frozen(family, "nf4"))))


def test_a_bias_that_the_base_has_no_place_for_does_not_merge(tmp_path: Path) -> None:
    theirs("llama", {"target_modules": QV, "lora_bias": True}, tmp_path)
    _, adapter = ours("llama", {}, tmp_path)
    assert adapter.obstacle == "the layout of the base has no bias for q_proj, v_proj"
    with pytest.raises(ConfigError, match="does not merge: the layout of the base"):
        next(adapter.merged())


def test_biases_that_an_old_peft_did_not_save_are_missed(tmp_path: Path) -> None:
    theirs("opt", {"target_modules": QV, "bias": "lora_only"}, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "base_layer" not in key}, path)
    with pytest.raises(ModelError, match=r"q_proj\.base_layer\.bias is missing \(expected 64\)"):
        ours("opt", {}, tmp_path)


REFUSED = {
    "a bias beside modules": ("bert_mlm", {"target_modules": ["query"], "bias": "all"}, LoRAConfig,
                              r"every bias \(bias='all'\), which cls\.predictions\.bias of this model cannot do"),
    "another method": ("llama", {"target_modules": QV, "trainable_token_indices": [3]}, PiSSAConfig,
                       r"has trainable_token_indices=\[3\], which adapter=pissa does not train: set adapter=lora"),
    "a transposed parameter": ("gpt2", {"target_modules": [], "target_parameters": ["mlp.c_proj.weight"]}, LoRAConfig,
                               r"adapts mlp\.c_proj\.weight, of which this model has nothing"),
    "looked up and trained": ("llama", {"target_modules": ["embed_tokens"], "trainable_token_indices": [3]}, LoRAConfig,
                              r"trains model\.embed_tokens in two ways"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    family, settings, mine, words = REFUSED[case]
    if case == "looked up and trained":  # PEFT refuses to make it
        theirs("llama", {"target_modules": ["embed_tokens"]}, tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(path.read_text().replace('"trainable_token_indices": null', '"trainable_token_indices": [3]'))
    else:
        theirs(family, settings, tmp_path)
    model = frozen(family)
    names = list(model.state_dict())
    with pytest.raises((ModelError, ConfigError), match=words) as raised:
        attach(model, mine(path=str(tmp_path)))
    assert "\n" not in str(raised.value)
    assert list(model.state_dict()) == names


def test_it_is_no_product_to_combine(tmp_path: Path) -> None:
    theirs("llama", {"target_modules": QV, "trainable_token_indices": [3]}, tmp_path)
    with pytest.raises(ModelError, match=r"also has trainable_token_indices=\[3\], which is no product to combine"):
        Source.read(tmp_path, 1.0)
    adapters = Adapters(frozen("llama"))
    adapters.attach("one", LoRAConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"one also has trainable_token_indices=\[3\]"):
        adapters.combine("both", {"one": 1.0})


def test_ia3_on_a_head_and_outside_blocks(tmp_path: Path) -> None:
    for family, settings in {
        "phi": {"target_modules": ["q_proj", "lm_head"], "feedforward_modules": []},
        "bert": {"target_modules": ["dense"], "feedforward_modules": ["dense"], "task_type": "SEQ_CLS"},
    }.items():
        stock = peft.get_peft_model(dense_twin(family), peft.IA3Config(**settings)).eval()
        with torch.no_grad():
            for name, parameter in stock.named_parameters():
                if "ia3" in name:
                    parameter.mul_(1.3)
        stock.save_pretrained(tmp_path / family)
        model = frozen(family)
        attach(model, IA3Config(path=str(tmp_path / family)))
        assert (logits(model) - logits(stock)).abs().max() <= BAR

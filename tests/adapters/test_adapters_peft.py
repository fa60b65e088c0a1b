"""Stock PEFT is the oracle: its logits from our files, and ours from its files, on the same dense weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from adapters_models import dense_twin, frozen, logits, lora, pefts
from safetensors.torch import load_file

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
BAR = 2e-5
OLD_SAMPLE = Path(__file__).parent / "samples" / "peft-0.19-experts"

OURS = {
    "llama": ("llama", {}),
    "llama-rslora": ("llama", {"rslora": True, "rank": 5, "alpha": 3.0}),
    "llama-some": ("llama", {"targets": ["q_proj", "layers.1.mlp.down_proj"]}),
    "llama-head": ("llama", {"train_also": ["lm_head"]}),
    "llama-head-lora": ("llama", {"targets": ["v_proj", "lm_head"]}),
    "llama-norms": ("llama", {"train_also": ["lm_head", "embed_tokens", "norm"]}),
    "llama-dropout": ("llama", {"dropout": 0.1}),
    "gpt2": ("gpt2", {}),
    "gpt2-tied": ("gpt2", {"train_also": ["lm_head", "wte"]}),
    "mixtral": ("mixtral", {}),
    "mixtral-dropout": ("mixtral", {"dropout": 0.1}),
    "mixtral-one": ("mixtral", {"targets": ["q_proj", "experts.down_proj"], "train_also": ["lm_head"]}),
    "mixtral-layer": ("mixtral", {"targets": ["layers.0.mlp.experts.*"]}),
    "gpt_oss": ("gpt_oss", {}),
}


NEW_STACKS = tuple(int(part) for part in peft.__version__.split(".")[:2]) >= (0, 20)
"""Before 0.20 PEFT laid stacked experts out the other way round; it cannot read files of today."""


def skip_old_stacks(family: str) -> None:
    if family in ("mixtral", "gpt_oss") and not NEW_STACKS:
        pytest.skip(f"PEFT {peft.__version__} lays stacked experts out otherwise")


def stock(model: torch.nn.Module, directory: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model, str(directory)).eval()
    return loaded


@pytest.mark.parametrize("quant", ["dense", "nf4"])
@pytest.mark.parametrize("case", OURS)
def test_stock_peft_gives_our_logits(case: str, quant: str, tmp_path: Path) -> None:
    family, settings = OURS[case]
    skip_old_stacks(family)
    model, adapter = lora(family, quant, **settings)
    adapter.save(tmp_path)
    theirs = stock(dense_twin(family, quant), tmp_path)
    mine = logits(model)
    with adapter.disabled():
        assert (mine - logits(model)).abs().max() > 0.01
    assert (logits(theirs) - mine).abs().max() <= BAR
    merged = logits(theirs.merge_and_unload())
    assert (merged - mine).abs().max() <= BAR


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_trained_together(tied: bool, tmp_path: Path) -> None:
    model, adapter = lora("llama", tied=tied, train_also=["lm_head", "embed_tokens"])
    whole = [name for name in adapter.trainable() if "lora_" not in name]
    assert len(whole) == (1 if tied else 2)
    adapter.save(tmp_path)
    theirs = stock(dense_twin("llama", tied=tied), tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= BAR
    merged = dict(adapter.merged())
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"]) == tied


THEIRS = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}),
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 3, "lora_alpha": 7, "use_rslora": True}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q|down)_proj", "r": 4, "lora_alpha": 8}),
    "patterns": ("llama", {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 8,
                           "rank_pattern": {"q_proj": 6}, "alpha_pattern": {r"layers\.0\..*up_proj": 16}}),
    "layers": ("llama", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "r": 4}),
    "excluded": ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj"],
                            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "mixtral-pattern": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"],
                                    "rank_pattern": {"experts.gate_up_proj": 3}}),
    "gpt_oss": ("gpt_oss", {"target_modules": ["q_proj"],
                            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_pefts_adapters_load_here(case: str, tmp_path: Path) -> None:
    family, settings = THEIRS[case]
    theirs = pefts(dense_twin(family), peft.LoraConfig(**settings), tmp_path)
    model = frozen(family)
    adapter = attach(model, LoRAConfig(path=str(tmp_path)))
    wanted = logits(theirs)
    assert (logits(model) - wanted).abs().max() <= BAR
    with adapter.disabled():
        assert (logits(model) - wanted).abs().max() > 0.01
    skip_old_stacks(family)
    # and back, through our own files, with ranks and alphas of single modules
    adapter.save(tmp_path / "again")
    again = stock(dense_twin(family), tmp_path / "again")
    assert (logits(again) - wanted).abs().max() <= BAR
    once_more = frozen(family)
    attach(once_more, LoRAConfig(path=str(tmp_path / "again")))
    assert torch.equal(logits(once_more), logits(model))


def test_stacked_experts_of_an_older_peft() -> None:
    """The sample is PEFT 0.19's, with the products that it computed; its gate_up_proj is as wide as it is tall."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    adapter = attach(model, LoRAConfig(path=str(OLD_SAMPLE)))
    deltas = load_file(OLD_SAMPLE / "deltas.safetensors")
    assert len(adapter.adapted) == len(deltas) == 2
    for name, module in adapter.adapted.items():
        zero = torch.zeros_like(module.dequantize(torch.float32))
        assert torch.allclose(module.merge(zero), deltas[name.rpartition(".")[2]], atol=1e-5)


def test_the_config_names_endings_where_they_are_enough(tmp_path: Path) -> None:
    _, adapter = lora("llama", targets=["q_proj", "v_proj"])
    adapter.save(tmp_path / "all")
    saved = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["q_proj", "v_proj"]
    assert (saved["r"], saved["lora_alpha"], saved["peft_type"]) == (4, 8, "LORA")
    _, adapter = lora("llama", targets=["layers.1.self_attn.q_proj"])
    adapter.save(tmp_path / "one")
    saved = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["model.layers.1.self_attn.q_proj"]

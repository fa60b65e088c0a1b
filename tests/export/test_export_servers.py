"""What servers refuse is named when an adapter is saved, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune.export.servers import BOTH, RULES, VLLM_RANKS, Saved, notes, read_saved

LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "target_modules": ["q_proj"], "target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip


def said(keys: tuple[str, ...] = (), mergeable: bool = True, **changed: Any) -> str:
    lines = notes(Saved(LORA | changed, keys), mergeable)
    assert len(lines) <= 1 and all("\n" not in line for line in lines)
    return "".join(lines)


def test_a_plain_lora_is_served_as_it_is() -> None:
    assert said() == ""
    assert said(r=8) == said(r=1) == ""


def test_a_rank_above_vllms_default_names_the_flag() -> None:
    assert said(r=17) == "vLLM serves this adapter with --max-lora-rank 32"
    assert said(r=64) == "vLLM serves this adapter with --max-lora-rank 64"
    assert said(r=8, lora_alpha=16, rank_pattern={"q_proj": 200}, alpha_pattern={"q_proj": 400}) != ""
    assert "vLLM will not load this adapter: it has a rank above 512" in said(r=513)
    assert VLLM_RANKS[-1] == 512


REFUSED = {
    "magnitudes (DoRA)": {"use_dora": True},
    "modules trained whole (modules_to_save: heads, embeddings)": {"modules_to_save": ["score"]},
    "biases that train (bias, lora_bias)": {"lora_bias": True},
    "rows of the token embedding that train (trainable_token_indices)": {"trainable_token_indices": [3]},
    "something else than LoRA's factors, and LoRA is all they read": {"peft_type": "IA3"},
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("mergeable", [True, False])
def test_what_both_refuse(what: str, mergeable: bool) -> None:
    advice = "serve a merged export (safetensors)" if mergeable else "it does not merge: serve it by transformers"
    line = said(mergeable=mergeable, **REFUSED[what])
    assert line == f"vLLM and llama.cpp will not load this adapter: it has {what}; {advice}"


@pytest.mark.parametrize("config", [{"finetune_method": "houlsby"}, {"finetune_method": "stack", "parts": []},
                                    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}])  # fmt: skip
def test_other_methods_are_no_lora(config: dict[str, Any]) -> None:
    (line,) = notes(Saved(config), mergeable=False)
    assert line.startswith("vLLM and llama.cpp will not load this adapter: it has something else than LoRA's factors")


def test_silent_differences_are_named_where_they_are() -> None:
    different = "would load this adapter and compute something else"
    assert said(use_rslora=True).startswith(f"llama.cpp {different}: it has rsLoRA's scaling")
    # alpha / rank of single modules: vLLM keeps one for all, llama.cpp divides one alpha by each rank
    assert said(rank_pattern={"q_proj": 8}).startswith(f"vLLM {different}: it has more than one scaling")
    assert "llama.cpp" not in said(rank_pattern={"q_proj": 8})
    same = said(rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 16})
    assert same.startswith(f"llama.cpp {different}: it has more than one alpha") and "vLLM" not in same
    assert said(alpha_pattern={"q_proj": 32}) == ""


def test_experts_and_embeddings() -> None:
    experts = said(target_parameters=["experts.down_proj"])
    assert "llama.cpp will not load this adapter: it has LoRA on stacked experts" in experts
    assert "vLLM may load this adapter, for some models: it has LoRA on stacked experts" in experts
    assert "LoRA on the token embedding" in said(keys=("base_model.model.embed_tokens.lora_embedding_A",))


def test_every_rule_has_a_source_and_a_case() -> None:
    assert all(rule.source and set(rule.servers) <= set(BOTH) for rule in RULES)
    assert not any(rule.applies(Saved(LORA)) for rule in RULES)


def test_saved_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    key = "base_model.model.embed_tokens.lora_embedding_A"
    save_file({key: torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    assert read_saved(tmp_path).keys == (key,)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert read_saved(tmp_path).keys == ()

"""Prompt tuning and P-tuning v1 against PEFT, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_models import bits, dense_twin, frozen, logits
from adapters_prompts import CASES, IN_PEFT, KINDS, L, attached, padded, said

from finetune.adapters.attach import attach
from finetune.adapters.prompt_tuning import PromptTuningConfig
from finetune.errors import ConfigError, ModelError

OTHERS = ("bert", "roberta", "t5", "bart", "llama_score")
"""Encoders, pairs of stacks, and a decoder with a classifier."""


@pytest.mark.parametrize(
    ("kind", "family"), [case for case in CASES if case[0] != "prelayer"] + [("mlp", family) for family in OTHERS]
)
def test_peft_computes_what_we_save(kind: str, family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, adapter = attached(kind, family)
    adapter.save(tmp_path)
    theirs = PeftModel.from_pretrained(dense_twin(family), tmp_path)
    assert not torch.allclose(logits(model), logits(frozen(family)), atol=1e-3)
    for mask in (None, padded("right"), padded("left")):
        if mask is not None and family == "llama_score":
            continue  # without tokens to look at, PEFT's classifier takes the last column, padded or not
        wanted = said(theirs, mask)
        assert (said(model, mask) - wanted).abs().max() <= 2e-5, mask


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("kind", IN_PEFT)
def test_we_compute_what_peft_saves(kind: str, family: str, tmp_path: Path) -> None:
    from peft import PromptEncoderConfig, get_peft_model
    from peft import PromptTuningConfig as Theirs

    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    torch.manual_seed(4)
    if kind == "prompt_tuning":
        config = Theirs(task_type=task, num_virtual_tokens=L, prompt_tuning_init="SAMPLE_VOCAB")
    else:
        config = PromptEncoderConfig(
            task_type=task, num_virtual_tokens=L, encoder_reparameterization_type=kind.upper(), encoder_hidden_size=24
        )
    theirs = get_peft_model(dense_twin(family), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    model = frozen(family)
    adapter = attach(model, KINDS[kind](path=str(tmp_path)))
    assert adapter.virtual_tokens == L
    if family == "t5":  # PEFT keeps a second set for the decoder, and does not use it
        from safetensors.torch import load_file

        assert len(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]) == 2 * L
    assert (said(model, None) - said(theirs, None)).abs().max() <= 2e-5
    again = tmp_path / "again"
    adapter.save(again)
    assert json.loads((again / "adapter_config.json").read_text())["num_virtual_tokens"] == L


def test_the_network_computes_what_pefts_does() -> None:
    from peft import PromptEncoder, PromptEncoderConfig

    for kind, layers in (("lstm", 2), ("lstm", 1), ("mlp", 2)):
        _, adapter = attached(kind, "llama", encoder_layers=layers, init="random")
        config = PromptEncoderConfig(
            num_virtual_tokens=L, token_dim=64, num_transformer_submodules=1, encoder_num_layers=layers,
            encoder_hidden_size=adapter.config.encoder_hidden_size or 64, encoder_reparameterization_type=kind.upper(),
        )  # fmt: skip
        theirs = PromptEncoder(config)
        theirs.load_state_dict(adapter.encoder.state_dict())
        assert torch.equal(bits(theirs(torch.arange(L)[None])[0]), bits(adapter.encoder()))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_modules_trained_whole_are_in_files_as_pefts(family: str, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model
    from peft import PromptTuningConfig as Theirs
    from safetensors.torch import load_file

    whole = ["lm_head"] if family == "llama" else []
    model, adapter = attached("prompt_tuning", family, train_also=whole)
    adapter.save(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(dense_twin(family), tmp_path / "ours")
    assert (said(model, None) - said(theirs, None)).abs().max() <= 2e-5
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    config = Theirs(task_type=task, num_virtual_tokens=L, modules_to_save=whole or None)
    other = get_peft_model(dense_twin(family), config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    other.save_pretrained(tmp_path / "theirs")
    both = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert both[0].keys() == both[1].keys()
    assert len(both[0]) == (2 if family == "llama" else 3)
    loaded = frozen(family)
    attach(loaded, PromptTuningConfig(path=str(tmp_path / "theirs")))
    assert (said(loaded, None) - said(other, None)).abs().max() <= 2e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "is of method PREFIX_TUNING: expected PROMPT_TUNING"),
        ({"num_ranks": 4}, "sets num_ranks=4, which finetune does not compute: expected a plain PROMPT_TUNING"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens is '5': expected a number from 1"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2: expected 1, or 2 for SEQ_2_SEQ_LM"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head': expected a list of names"),
        ({"token_dim": 32}, "has token_dim 32, but here it is 64"),
    ],
)
def test_settings_of_a_file_that_we_do_not_compute_are_refused_by_name(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    _, adapter = attached("prompt_tuning", "llama")
    adapter.save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=words) as caught:
        attach(frozen("llama"), PromptTuningConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_another_length_than_the_files_is_refused(tmp_path: Path) -> None:
    for kind, words in (("prompt_tuning", "adapter.prefix_length is 7, but the adapter .* has 5"), ("mlp", "has 5")):
        _, adapter = attached(kind, "llama")
        adapter.save(tmp_path / kind)
        with pytest.raises(ConfigError, match=words):
            attach(frozen("llama"), KINDS[kind](path=str(tmp_path / kind), prefix_length=7))

"""The weights of a checkpoint read again: as the loader reads them, one at a time, and without a trace."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from finetune.errors import ModelError
from finetune.model.config import ModelConfig
from finetune.model.load import load
from finetune.model.originals import read_originals
from finetune.quant.affine import Int4Config
from finetune.quant.dense import DenseConfig
from finetune.quant.freeze import freeze
from finetune.structure import inspect

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                num_attention_heads=4)
    ),
}  # fmt: skip


def saved(family: str, directory: Path) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_comes_as_it_was(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    wanted = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    freeze(model, Int4Config(), inspect(model))
    found: dict[str, torch.Tensor] = {}
    before = torch.random.get_rng_state()
    read_originals(model, tmp_path, dtype, lambda name, weight: found.update({name: weight.clone()}))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {n for p in inspect(model).projections for n in (p.name, f"{p.name}.weight")} & set(wanted) <= set(found)
    for name, weight in found.items():
        assert torch.equal(weight, wanted[name]), name


def test_nothing_is_held_of_what_was_shown(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    shown: list[weakref.ref] = []
    most = 0

    def visit(_: str, weight: torch.Tensor) -> None:
        nonlocal most
        shown.append(weakref.ref(weight))
        most = max(most, sum(ref() is not None for ref in shown))

    read_originals(model, tmp_path, torch.float32, visit)
    gc.collect()
    assert len(shown) > 15 and most <= 2
    assert not any(ref() is not None for ref in shown)


def test_what_is_stored_is_what_they_round_to(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="a")
    tokenizer.save_pretrained(tmp_path)
    loaded = load(ModelConfig(path=str(tmp_path)), Int4Config(group_size=32), torch.bfloat16, "cpu")
    assert loaded.originals is not None
    count = 0

    def visit(name: str, weight: torch.Tensor) -> None:
        nonlocal count
        module = loaded.model.get_submodule(name.removesuffix(".weight"))
        if hasattr(module, "requantize"):
            count += 1
            assert torch.equal(module.requantize(weight.float()).weight, module.weight)

    loaded.originals(visit)
    assert count == 14
    assert load(ModelConfig(path=str(tmp_path)), DenseConfig(), torch.float32, "cpu").originals is None


def test_faults_in_one_line(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)

    def refuse(name: str, weight: torch.Tensor) -> None:
        raise ModelError(f"{name} is not to my taste")

    with pytest.raises(ModelError, match="is not to my taste"):
        read_originals(model, tmp_path, torch.float32, refuse)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be read again for its original weights: ") as raised:
        read_originals(model, tmp_path, torch.float32, lambda name, weight: None)
    assert "\n" not in str(raised.value)


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))

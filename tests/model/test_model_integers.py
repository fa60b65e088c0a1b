"""Integer storage formats on disk: what stock bitsandbytes reads and writes, what only we read, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune.errors import ModelError
from finetune.model.config import ModelConfig
from finetune.model.describe import storage_table
from finetune.model.load import Loaded, load
from finetune.quant.affine import Int3Config, Int4Config, Int8gConfig
from finetune.quant.base import FrozenExperts, FrozenLinear, QuantConfig
from finetune.quant.int8_storage import Int8Config
from finetune.quant.keep import KeepConfig
from finetune.quant.nf4 import NF4Config

Checkpoint = Callable[..., Path]
PROJECTION = {"GPT2": "transformer.h.0.attn.c_attn"}


def ours(path: Path, quant: QuantConfig, dtype: torch.dtype = torch.float32) -> Loaded:
    return load(ModelConfig(path=str(path)), quant, dtype, "cpu")


def saved(loaded: Loaded, path: Path, source: Path) -> Path:
    loaded.model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path / name)
    return path


def stock(path: Path, **settings: Any) -> Any:
    quantization = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, **settings)} if settings else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, device_map="cpu", **quantization)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_int8_we_save_is_what_stock_saves_and_it_reads_ours(
    checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor, family: str
) -> None:
    path = checkpoint(family)
    theirs = stock(path, llm_int8_threshold=6.0)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = ours(path, Int8Config(), torch.float16)
    saved(loaded, tmp_path / "ours", path)
    mine, other = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    again = stock(tmp_path / "ours")
    module = PROJECTION.get(family, "model.layers.0.self_attn.q_proj")
    assert type(again.get_submodule(module)).__name__ == "Linear8bitLt"
    with torch.no_grad():
        exact = loaded.model(ids).logits.float()
        difference = (again(ids).logits.float() - exact).norm() / exact.norm()
    assert difference < 2e-2  # inputs a rounding apart get other int8 codes now and then


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_we_read_the_int8_that_stock_saves(checkpoint: Checkpoint, tmp_path: Path, threshold: float) -> None:
    path = checkpoint("Llama")
    stock(path, llm_int8_threshold=threshold).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(path / name, tmp_path / name)
    loaded = ours(tmp_path, KeepConfig(), torch.float16)
    assert loaded.quant == Int8Config(threshold=threshold)
    mine, fresh = loaded.model.state_dict(), ours(path, Int8Config(), torch.float16).model.state_dict()
    assert all(torch.equal(mine[key], fresh[key]) for key in fresh)
    assert ours(tmp_path, Int8Config(threshold=2.0), torch.float16).quant == Int8Config(threshold=2.0)
    with pytest.raises(ModelError, match=r"quant=nf4 conflicts with .*quant=int8"):
        ours(tmp_path, NF4Config())


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mixtral", "GptOss"])
@pytest.mark.parametrize(
    "quant",
    [
        Int8Config(),
        Int8gConfig(),
        Int4Config(group_size=32, zero_point="real"),
        Int3Config(symmetric=True),
        NF4Config(),
    ],
    ids=lambda quant: quant.name,
)
def test_a_saved_model_is_a_base_again(
    checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor, family: str, quant: QuantConfig
) -> None:
    path = checkpoint(family)
    loaded = ours(path, quant)
    again = ours(saved(loaded, tmp_path, path), KeepConfig())
    assert again.quant == quant
    assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    kinds = {type(m) for m in again.model.modules() if isinstance(m, FrozenLinear | FrozenExperts)}
    assert kinds == {type(m) for m in loaded.model.modules() if isinstance(m, FrozenLinear | FrozenExperts)}
    rows = storage_table(again.model)
    assert {row.storage for row in rows if not row.dense} == {quant.name}
    saved(again, tmp_path / "again", path)
    before, after = (load_file(p / "model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("family", "quant"), [("Llama", Int4Config()), ("GptOss", Int8Config())], ids=str)
def test_stock_refuses_by_name_what_it_cannot_read(
    checkpoint: Checkpoint, tmp_path: Path, family: str, quant: QuantConfig
) -> None:
    loaded = ours(checkpoint(family), quant)
    assert loaded.quantization_config == {
        "quant_method": "finetune",
        "format_version": 1,
        "quant": dataclasses.asdict(quant),
    }
    saved(loaded, tmp_path, checkpoint(family))
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert told == loaded.quantization_config


def test_conflicts_are_one_line_that_names_both(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint("Llama")
    four = saved(ours(path, NF4Config()), tmp_path / "nf4", path)
    with pytest.raises(ModelError, match=r"quant=int4 conflicts with .*quant=nf4: use quant=keep") as error:
        ours(four, Int4Config())
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    integers = saved(ours(path, Int4Config()), tmp_path / "int4", path)
    with pytest.raises(ModelError, match=r"quant.group_size=128 conflicts .*quant.group_size=64"):
        ours(integers, Int4Config(group_size=128))


def test_a_packed_head_comes_back(checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor) -> None:
    path = checkpoint("GPTNeoX")
    loaded = ours(path, Int4Config(head=True))
    again = ours(saved(loaded, tmp_path, path), KeepConfig())
    assert again.quant == Int4Config(head=True) and isinstance(again.model.lm_head, FrozenLinear)
    assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)

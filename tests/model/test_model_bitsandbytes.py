"""Loading and saving held against stock transformers with bitsandbytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune.errors import ModelError
from finetune.model.config import ModelConfig
from finetune.model.load import Loaded, load
from finetune.quant.base import FrozenLinear
from finetune.quant.dense import DenseConfig
from finetune.quant.fp4 import FP4Config
from finetune.quant.keep import KeepConfig
from finetune.quant.nf4 import NF4Config

Checkpoint = Callable[..., Path]


def ours(path: Path, quant: Any, dtype: torch.dtype = torch.float32) -> Loaded:
    return load(ModelConfig(path=str(path)), quant, dtype, "cpu")


def stock(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "device_map": "cpu"}
    if settings:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings)
    return AutoModelForCausalLM.from_pretrained(path, **options)


def same_bits(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(mine) == set(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        if ".quant_state." in name:
            assert json.loads(bytes(mine[name].numpy())) == json.loads(bytes(tensor.numpy())), name
        else:
            assert torch.equal(mine[name].cpu(), tensor.cpu()), name


@pytest.mark.parametrize(
    ("family", "quant", "dtype"),
    [
        ("Llama", NF4Config(), torch.float32),
        ("Llama", NF4Config(double_quant=False), torch.bfloat16),
        ("Llama", FP4Config(), torch.float32),
        ("GPT2", NF4Config(), torch.float32),
        ("Qwen2Moe", NF4Config(), torch.bfloat16),
    ],
    ids=str,
)
def test_what_we_save_is_what_stock_saves(
    checkpoint: Checkpoint, tmp_path: Path, family: str, quant: Any, dtype: torch.dtype
) -> None:
    path = checkpoint(family)
    theirs = stock(path, dtype, bnb_4bit_quant_type=quant.name, bnb_4bit_use_double_quant=quant.double_quant)
    theirs.save_pretrained(tmp_path)
    # Left out: experts (stock has no 4-bit ones), and the gate of a shared expert, which stock packs and we keep dense.
    saved = _linears(load_file(tmp_path / "model.safetensors"))
    mine = _linears(ours(path, quant, dtype).model.state_dict())
    if "lm_head.weight" not in saved:  # tied: written once
        del mine["lm_head.weight"]
    same_bits(mine, saved)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("quant", [NF4Config(), FP4Config(double_quant=False)], ids=["nf4", "fp4"])
def test_stock_reads_what_we_save(
    checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor, family: str, quant: Any
) -> None:
    loaded = ours(checkpoint(family), quant)
    save_file(
        {k: v.clone() for k, v in loaded.model.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((checkpoint(family) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": loaded.quantization_config}))
    theirs = stock(tmp_path)
    assert type(theirs.get_submodule(_projection(family))).__name__ == "Linear4bit"
    torch.testing.assert_close(theirs(ids).logits, loaded.model(ids).logits, rtol=0, atol=2e-5)


def test_save_pretrained_writes_the_same(checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor) -> None:
    loaded = ours(checkpoint("Llama"), NF4Config())
    loaded.model.save_pretrained(tmp_path)
    torch.testing.assert_close(stock(tmp_path)(ids).logits, loaded.model(ids).logits, rtol=0, atol=2e-5)
    again = ours(_with_tokenizer(tmp_path, checkpoint("Llama")), KeepConfig())
    again.model.save_pretrained(tmp_path / "again")
    same_bits(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("Llama", {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"}),
        ("Llama", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float32"}),
        ("GPT2", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float16"}),
        ("Mixtral", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_we_read_what_stock_saves(
    checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor, family: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    theirs = stock(checkpoint(family), dtype, **settings)
    theirs.save_pretrained(tmp_path)
    loaded = ours(_with_tokenizer(tmp_path, checkpoint(family)), KeepConfig(), dtype)
    assert loaded.quant.name == settings["bnb_4bit_quant_type"]
    assert loaded.quant.double_quant == settings.get("bnb_4bit_use_double_quant", False)
    assert isinstance(loaded.model.get_submodule(_projection(family)), FrozenLinear)
    assert {p.dtype for p in loaded.model.parameters()} <= {dtype, torch.uint8, torch.float32}
    tolerance = 2e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(loaded.model(ids).logits, theirs(ids).logits, rtol=0, atol=tolerance)


def test_a_packed_base_refuses_other_settings(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ours(checkpoint("Llama"), NF4Config()).model.save_pretrained(tmp_path)
    _with_tokenizer(tmp_path, checkpoint("Llama"))
    assert ours(tmp_path, NF4Config()).quant == NF4Config()
    for quant, asked, has in [
        (FP4Config(), "quant=fp4", "quant=nf4"),
        (NF4Config(block_size=128), "quant.block_size=128", "quant.block_size=64"),
        (NF4Config(double_quant=False), "quant.double_quant=False", "quant.double_quant=True"),
        (DenseConfig(), "quant=none", "quant=nf4"),
    ]:
        with pytest.raises(ModelError, match=f"{asked} .*{has}"):
            ours(tmp_path, quant)


def test_a_packed_head_is_kept_and_a_dense_one_cannot_be_asked_to_be(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ours(checkpoint("GPTNeoX"), NF4Config(head=True)).model.save_pretrained(tmp_path / "head")
    loaded = ours(_with_tokenizer(tmp_path / "head", checkpoint("GPTNeoX")), KeepConfig())
    assert loaded.quant == NF4Config(head=True) and isinstance(loaded.model.lm_head, FrozenLinear)
    ours(checkpoint("GPTNeoX"), NF4Config()).model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match=r"quant.head=true conflicts with the checkpoint, which holds lm_head"):
        ours(_with_tokenizer(tmp_path / "dense", checkpoint("GPTNeoX")), NF4Config(head=True))


def test_a_storage_we_do_not_read_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("Llama"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    for told, message in [
        ({"quant_method": "aqlm", "bits": 4}, "stored as aqlm"),
        ({"quant_method": "gptq", "bits": 4}, "says gptq, but the shards hold no quantized weight"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "the shards hold no quantized weight"),
        ({"quant_method": "finetune", "format_version": 2}, "format_version 2"),
    ]:
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
        with pytest.raises(ModelError, match=message):
            ours(tmp_path / "base", KeepConfig())


def _linears(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if "experts." not in name and "expert_gate" not in name}


def _with_tokenizer(path: Path, source: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path / name)
    return path


def _projection(family: str) -> str:
    return "transformer.h.0.attn.c_attn" if family == "GPT2" else "model.layers.0.self_attn.q_proj"

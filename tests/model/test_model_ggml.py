"""Models in llama.cpp's blocks: stored while loading, saved, read again, with adapters on top."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.errors import ModelError
from finetune.kernels import ggml
from finetune.model.config import ModelConfig
from finetune.model.describe import storage_table
from finetune.model.load import Loaded, load
from finetune.quant.base import FrozenExperts, FrozenLinear, QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.ggml import Q4_0Config, Q4_1Config, Q5_0Config, Q5_1Config, Q8_0Config
from finetune.quant.ggml_storage import GgmlConfig
from finetune.quant.keep import KeepConfig
from finetune.quant.nf4 import NF4Config

Checkpoint = Callable[..., Path]


def ours(path: Path, quant: QuantConfig) -> Loaded:
    return load(ModelConfig(path=str(path)), quant, torch.float32, "cpu")


def saved(loaded: Loaded, path: Path, source: Path) -> Path:
    loaded.model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path / name)
    return path


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        ("Llama", Q4_0Config()),
        ("Llama", Q5_0Config()),
        ("GPT2", Q4_1Config()),
        ("Mixtral", Q5_1Config()),
        ("GptOss", Q8_0Config()),
        ("Mixtral", Q4_0Config(outliers=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}-{value.outliers}",
)
def test_a_saved_model_is_a_base_again(
    checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor, family: str, quant: GgmlConfig
) -> None:
    path, kind = checkpoint(family), quant.name
    loaded = ours(path, quant)
    again = ours(saved(loaded, tmp_path, path), KeepConfig())
    assert again.quant == quant
    assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    frozen = [m for m in again.model.modules() if isinstance(m, FrozenLinear | FrozenExperts)]
    assert {row.storage for row in storage_table(again.model) if not row.dense} == {kind} and frozen
    saved(again, tmp_path / "again", path)
    before, after = (load_file(p / "model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    told = json.loads((tmp_path / "config.json").read_text("utf-8"))["quantization_config"]
    assert told["quant_method"] == "finetune" and told["quant"]["name"] == kind
    with pytest.raises(ModelError, match=rf"quant=nf4 conflicts with .*quant={kind}"):
        ours(tmp_path, NF4Config())


def test_what_is_written_are_the_bytes_of_a_gguf_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    path = checkpoint("Llama")
    dense, name = ours(path, DenseConfig()).model, "model.layers.0.mlp.up_proj"
    for quant in (Q4_0Config(), Q5_1Config(), Q8_0Config()):
        target = saved(ours(path, quant), tmp_path / quant.name, path)
        held = load_file(target / "model.safetensors")[f"{name}.weight"]
        w_OI = dense.get_submodule(name).dequantize(torch.float32)
        width = w_OI.shape[1] // ggml.BLOCK * ggml.BLOCK
        theirs = gguf.quants.quantize(
            w_OI[:, :width].contiguous().numpy(), gguf.GGMLQuantizationType[quant.name.upper()]
        )
        assert width and torch.equal(held[:, : theirs.shape[1]], torch.from_numpy(theirs))


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mixtral"])
def test_adapters_train_on_blocks_as_on_their_decoded_weights(
    checkpoint: Checkpoint, ids: torch.Tensor, family: str
) -> None:
    path = checkpoint(family)
    gradients = []
    for decoded in (False, True):
        model = ours(path, Q5_1Config()).model
        if decoded:
            dense = ours(path, DenseConfig()).model
            for name, module in model.named_modules():
                if isinstance(module, FrozenLinear | FrozenExperts) and type(module).__name__.startswith("Ggml"):
                    dense.get_submodule(name).store(module.dequantize(torch.float32))
            model = dense
        torch.manual_seed(0)
        attach(model, LoRAConfig(rank=4))
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)

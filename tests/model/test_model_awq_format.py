"""AWQ checkpoints as bases: what is decoded against the public layout, training, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_checkpoints as packing
import pytest
import torch
from packed_checkpoints import Integers, Packed
from safetensors.torch import load_file, save_file

from finetune.adapters.base import ADAPTERS
from finetune.adapters.lora import LoRAConfig
from finetune.errors import ModelError
from finetune.model.config import ModelConfig
from finetune.model.describe import storage_table
from finetune.model.load import Loaded, load
from finetune.quant.affine import AffineLinear, Int4Config
from finetune.quant.base import FrozenLinear
from finetune.quant.int8_storage import Int8Config
from finetune.quant.keep import KeepConfig

Checkpoint = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"
TOLD = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def write(
    dense: Path, directory: Path, told: dict[str, Any] | None = TOLD, group_size: int = 32, **options: Any
) -> Packed:
    rng = np.random.default_rng(0)
    symmetric = options.pop("symmetric", False)

    def make(name: str, out_features: int, in_features: int) -> Integers:
        return packing.integers(rng, out_features, in_features, 4, group_size, symmetric)

    return packing.write(dense, directory, make, packing.awq, told, **options)


def read(path: Path, quant: Any = None, dtype: torch.dtype = torch.float32) -> Loaded:
    return load(ModelConfig(path=str(path)), quant or KeepConfig(), dtype, "cpu")


def assert_exact(loaded: Loaded, packed: Packed) -> None:
    for name, weight in packed.weights.items():
        module = loaded.model.get_submodule(name)
        assert isinstance(module, AffineLinear)
        assert np.array_equal(module.dequantize(torch.float32).numpy(), weight.dense_OI()), name


@pytest.mark.parametrize(
    ("group_size", "symmetric", "dtype"),
    [(32, False, torch.float32), (64, False, torch.bfloat16), (128, True, torch.float16), (-1, False, torch.float32)],
)
def test_weights_are_those_of_the_layout_bit_for_bit(
    checkpoint: Checkpoint, tmp_path: Path, group_size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    told = TOLD | {"group_size": group_size, "zero_point": not symmetric}
    packed = write(checkpoint(), tmp_path / "q", told, group_size, symmetric=symmetric)
    loaded = read(packed.path, dtype=dtype)
    assert len(packed.weights) == 14
    assert_exact(loaded, packed)
    assert loaded.quant == Int4Config(group_size=group_size, symmetric=symmetric)
    frozen = loaded.model.get_submodule(Q_PROJ)
    assert frozen.scale.dtype == torch.float16 and (frozen.zero is None) == symmetric
    assert {row.storage for row in storage_table(loaded.model) if row.block and not row.dense} == {"int4"}


def test_settings_in_a_file_of_their_own_under_their_old_names(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = write(checkpoint(), tmp_path / "q", None)
    beside = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (packed.path / "quant_config.json").write_text(json.dumps(beside), "utf-8")
    assert_exact(read(packed.path), packed)


def test_what_was_not_converted_stays_dense(checkpoint: Checkpoint, tmp_path: Path) -> None:
    told = TOLD | {"modules_to_not_convert": ["self_attn"]}
    packed = write(checkpoint(), tmp_path / "q", told, modules=("mlp",))
    loaded = read(packed.path)
    assert len(packed.weights) == 6
    assert_exact(loaded, packed)
    dense = load_file(packed.path / "model.safetensors")[f"{Q_PROJ}.weight"]
    linear = loaded.model.get_submodule(Q_PROJ)
    assert isinstance(linear, FrozenLinear) and torch.equal(linear.dequantize(torch.float32), dense)


def test_lora_trains_on_it(checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor) -> None:
    loaded = read(write(checkpoint(), tmp_path / "q").path)
    before = loaded.model(ids).logits
    adapter = ADAPTERS.build(LoRAConfig(rank=4), loaded.model)
    assert torch.equal(loaded.model(ids).logits, before)
    loaded.model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.trainable().values())


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"version": "gemv"}, r"is AWQ in the layout 'gemv', which is not read here: expected gemm"),
        ({"version": "gemv_fast"}, r"layout 'gemv_fast'"),
        ({"version": "GEMM", "backend": "llm-awq"}, r"layout 'llm-awq'"),
        ({"bits": 8}, r"is AWQ in 8 bits: the layout gemm has 4"),
        ({"group_size": 16}, r"quant\.group_size is 16: expected a power of two from 32"),
        ({"group_size": None}, r"group_size of its quantization is None"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_read_are_named_before_weights_are(
    checkpoint: Checkpoint, tmp_path: Path, told: dict[str, Any], words: str
) -> None:
    packed = write(checkpoint(), tmp_path / "q", TOLD | told)
    with pytest.raises(ModelError, match=words) as raised:
        read(packed.path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("qzeros", r"q_proj\.qzeros is missing from the checkpoint"),
        ("scales", r"q_proj\.scales is missing from the checkpoint"),
    ],
)
def test_missing_tensors_are_named(checkpoint: Checkpoint, tmp_path: Path, key: str, words: str) -> None:
    packed = write(checkpoint(), tmp_path / "q")
    tensors = load_file(packed.path / "model.safetensors")
    del tensors[f"{Q_PROJ}.{key}"]
    save_file(tensors, packed.path / "model.safetensors")
    with pytest.raises(ModelError, match=words):
        read(packed.path)


def test_shapes_of_another_layout_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Groups of another size than config.json says."""
    packed = write(checkpoint(), tmp_path / "q", TOLD | {"group_size": 64})
    with pytest.raises(ModelError, match=r"\.qzeros is \[6, 16\] torch\.int32, expected \[3, 16\]"):
        read(packed.path)
    with pytest.raises(ModelError, match=r"quant=int8 conflicts with .* quant=int4"):
        read(packed.path, Int8Config())

"""Experts that a checkpoint packed one by one become the stacks that the model reads, bit for bit."""

from __future__ import annotations

import dataclasses
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
from finetune.model.load import Loaded, load
from finetune.quant.affine import AffineExperts
from finetune.quant.dense import DenseExperts
from finetune.quant.keep import KeepConfig

Checkpoint = Callable[..., Path]
FAMILIES = {
    "Mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "Qwen2Moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def write(
    dense: Path,
    directory: Path,
    told: dict[str, Any] = GPTQ,
    modules: tuple[str, ...] = ("self_attn", "experts"),
    change: Callable[[str, Integers], Integers] = lambda name, weight: weight,
) -> Packed:
    rng = np.random.default_rng(0)

    def make(name: str, *shape: int) -> Integers:
        return change(name, packing.integers(rng, *shape, told["bits"], 32, bool(told.get("sym"))))

    return packing.write(dense, directory, make, packing.awq if told is AWQ else packing.gptq, told, modules)


def read(path: Path, dtype: torch.dtype = torch.float32) -> Loaded:
    return load(ModelConfig(path=str(path)), KeepConfig(), dtype, "cpu")


@pytest.mark.parametrize(
    ("family", "told", "dtype"),
    [
        ("Mixtral", GPTQ, torch.float32),
        ("Mixtral", GPTQ | {"bits": 3, "sym": True}, torch.bfloat16),
        ("Qwen2Moe", GPTQ | {"bits": 8}, torch.float32),
        ("Qwen2Moe", AWQ, torch.float32),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stacks_hold_the_experts_in_order(
    checkpoint: Checkpoint, tmp_path: Path, ids: torch.Tensor, family: str, told: dict[str, Any], dtype: torch.dtype
) -> None:
    packed = write(checkpoint(family), tmp_path / "q", told)
    loaded = read(packed.path, dtype)
    inside, (gate, up, down) = FAMILIES[family]
    for layer in range(2):
        experts = loaded.model.get_submodule(f"model.layers.{layer}.mlp.experts")
        assert isinstance(experts.gate_up_proj, AffineExperts) and isinstance(experts.down_proj, AffineExperts)
        theirs = f"model.layers.{layer}.{inside}"
        one = {part: [packed.weights[f"{theirs}.{e}.{part}"].dense_OI() for e in range(4)] for part in (gate, up, down)}
        joined = np.concatenate([np.stack(one[gate]), np.stack(one[up])], axis=1)
        assert np.array_equal(experts.gate_up_proj.dequantize(torch.float32).numpy(), joined)
        assert np.array_equal(experts.down_proj.dequantize(torch.float32).numpy(), np.stack(one[down]))
        assert (experts.down_proj.zero is None) == bool(told.get("sym"))
    if dtype == torch.float32:
        before = loaded.model(ids).logits
        adapter = ADAPTERS.build(LoRAConfig(rank=2), loaded.model)
        assert torch.equal(loaded.model(ids).logits, before)
        loaded.model(ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in adapter.trainable().values())


def test_experts_that_were_left_dense_are_merged_as_ever(checkpoint: Checkpoint, tmp_path: Path) -> None:
    dense = load(ModelConfig(path=str(checkpoint("Mixtral"))), KeepConfig(), torch.float32, "cpu")
    loaded = read(write(checkpoint("Mixtral"), tmp_path / "q", modules=("self_attn",)).path)
    mine, theirs = (each.model.model.layers[1].mlp.experts.gate_up_proj for each in (loaded, dense))
    assert isinstance(mine, DenseExperts) and torch.equal(mine.weight, theirs.weight)


def test_a_symmetric_expert_stands_beside_one_with_zero_points(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def change(name: str, weight: Integers) -> Integers:
        return weight if ".2." in name else dataclasses.replace(weight, zero_GO=np.full_like(weight.zero_GO, 8))

    packed = write(checkpoint("Mixtral"), tmp_path / "q", GPTQ | {"sym": True})
    assert read(packed.path).model.model.layers[0].mlp.experts.down_proj.zero is None
    rng = np.random.default_rng(0)
    packed = packing.write(
        checkpoint("Mixtral"),
        tmp_path / "mixed",
        lambda name, *shape: change(name, packing.integers(rng, *shape, 4, 32, False)),
        packing.gptq,
        GPTQ | {"sym": True},
        ("experts",),
    )
    stack = read(packed.path).model.model.layers[0].mlp.experts.down_proj.dequantize(torch.float32).numpy()
    for expert in range(4):
        weight = packed.weights[f"model.layers.0.block_sparse_moe.experts.{expert}.w2"]
        assert np.array_equal(stack[expert], weight.dense_OI())


def test_what_no_stack_can_hold_is_named_in_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    packed = write(
        checkpoint("Mixtral"),
        tmp_path / "order",
        change=lambda name, weight: dataclasses.replace(weight, group_I=rng.permutation(weight.group_I)),
    )
    with pytest.raises(
        ModelError, match=r"experts\.\w+: experts are packed in act-order, which no stack can hold"
    ) as e:
        read(packed.path)
    assert "\n" not in str(e.value)
    packed = write(checkpoint("Mixtral"), tmp_path / "part")
    tensors = load_file(packed.path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.scales"]
    save_file(tensors, packed.path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: the checkpoint lacks parts") as e:
        read(packed.path)
    assert "\n" not in str(e.value)

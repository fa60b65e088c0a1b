"""compressed-tensors' `pack-quantized` checkpoints as bases, packed by hand and by the package itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_checkpoints as packing
import pytest
import torch
from packed_checkpoints import Integers

from finetune.errors import ModelError
from finetune.model.config import ModelConfig
from finetune.model.load import Loaded, load
from finetune.quant.affine_ordered import OrderedAffineLinear
from finetune.quant.keep import KeepConfig

Checkpoint = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def told(bits: int = 4, group_size: int = 32, symmetric: bool = False, **more: Any) -> dict[str, Any]:
    row = group_size < 0
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if row else "group",
        "group_size": None if row else group_size,
        **more,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def by_hand(weight: Integers) -> dict[str, np.ndarray]:
    """The package's tensors: signed codes with 2^(bits-1) added, which are those of `Integers`."""
    out, width = weight.codes_IO.T.shape
    tensors = {
        "weight_packed": packing.bits_into_words(weight.codes_IO.T, weight.bits),
        "weight_scale": weight.scale_GO.T,
        "weight_shape": np.array([out, width]),
    }
    if (weight.zero_GO != 2 ** (weight.bits - 1)).any():
        tensors["weight_zero_point"] = packing.bits_into_words(weight.zero_GO, weight.bits).T
    if (np.diff(weight.group_I) < 0).any():
        tensors["weight_g_idx"] = weight.group_I
    return tensors


def by_the_package(weight: Integers) -> dict[str, np.ndarray]:
    """The same, by its own function."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (weight.bits - 1)
    codes_OI = torch.from_numpy(weight.codes_IO.T - half).to(torch.int8)
    zero_OG = torch.from_numpy(weight.zero_GO.T - half).to(torch.int8)
    tensors = by_hand(weight) | {"weight_packed": pack_to_int32(codes_OI, weight.bits).numpy()}
    if "weight_zero_point" in tensors:
        tensors["weight_zero_point"] = pack_to_int32(zero_OG, weight.bits, packed_dim=0).numpy()
    return tensors


def read(path: Path) -> Loaded:
    return load(ModelConfig(path=str(path)), KeepConfig(), torch.float32, "cpu")


@pytest.mark.parametrize("pack", [by_hand, by_the_package])
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "act_order"),
    [(4, 128, True, False), (4, 32, False, True), (8, 64, False, False), (8, -1, False, False), (4, 32, True, True)],
)
def test_weights_are_those_of_the_layout_bit_for_bit(
    checkpoint: Checkpoint, tmp_path: Path, bits: int, group_size: int, symmetric: bool, act_order: bool, pack: Any
) -> None:
    if pack is by_the_package:
        pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
    rng = np.random.default_rng(0)

    def make(name: str, out_features: int, in_features: int) -> Integers:
        weight = packing.integers(rng, out_features, in_features, bits, group_size, symmetric)
        return dataclasses.replace(weight, group_I=rng.permutation(weight.group_I)) if act_order else weight

    packed = packing.write(checkpoint(), tmp_path / "q", make, pack, told(bits, group_size, symmetric))
    loaded = read(packed.path)
    for name, weight in packed.weights.items():
        module = loaded.model.get_submodule(name)
        assert isinstance(module, OrderedAffineLinear) == act_order
        assert np.array_equal(module.dequantize(torch.float32).numpy(), weight.dense_OI()), name


def test_an_index_of_minus_ones_moved_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    packed = packing.write(
        checkpoint(),
        tmp_path / "q",
        lambda name, *shape: packing.integers(rng, *shape, 4, 32, False),
        lambda weight: by_hand(weight) | {"weight_g_idx": np.full_like(weight.group_I, -1)},
        told(),
    )
    decoded = read(packed.path).model.get_submodule(Q_PROJ).dequantize(torch.float32)
    assert np.array_equal(decoded.numpy(), packed.weights[Q_PROJ].dense_OI())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (told(3), r"is packed as 3 bits int by group, which is not read here"),
        (told(4, 24), r"quant\.group_size is 24: expected a power of two"),
        (told() | {"config_groups": {}}, r"config\.json has 0 schemes of weights, expected one for all layers"),
    ],
    ids=["3-bits", "groups-of-24", "no-scheme"],
)
def test_what_is_not_read_is_named(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    rng = np.random.default_rng(0)
    packed = packing.write(
        checkpoint(),
        tmp_path / "q",
        lambda name, *shape: packing.integers(rng, *shape, 4, 32, False),
        by_hand,
        settings,
    )
    with pytest.raises(ModelError, match=words) as raised:
        read(packed.path)
    assert "\n" not in str(raised.value)

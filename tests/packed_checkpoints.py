"""Checkpoints as GPTQ's and AWQ's packages lay them out, packed bit by bit from the layout, and what they stand for.

Layouts: AutoGPTQ's qlinear_cuda.py and AutoAWQ's gemm.py, their `pack` and `from_linear`. Everything here is numpy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Integers:
    """A weight in integers: codes_IO and group_I with scale_GO and zero_GO."""

    codes_IO: np.ndarray
    group_I: np.ndarray
    scale_GO: np.ndarray
    zero_GO: np.ndarray
    bits: int

    def dense_OI(self) -> np.ndarray:
        """What it stands for, float32."""
        scale, zero = self.scale_GO.astype(np.float32), self.zero_GO.astype(np.float32)
        weight_IO = (self.codes_IO.astype(np.float32) - zero[self.group_I]) * scale[self.group_I]
        return weight_IO.T


def integers(
    rng: np.random.Generator, out_features: int, in_features: int, bits: int, group_size: int, symmetric: bool
) -> Integers:
    """Random codes, scales and zero points, zeros of 0 and of the largest code among them."""
    groups = 1 if group_size < 0 else -(-in_features // group_size)
    group_I = np.arange(in_features) // (in_features if group_size < 0 else group_size)
    codes_IO = rng.integers(0, 2**bits, (in_features, out_features))
    scale_GO = rng.uniform(0.004, 0.01, (groups, out_features)).astype(np.float16) * np.float16(16 / 2**bits)
    zero_GO = rng.integers(0, 2**bits, (groups, out_features))
    zero_GO[0, :3] = (0, 2**bits - 1, 0)
    if symmetric:
        zero_GO[:] = 2 ** (bits - 1)
    return Integers(codes_IO, group_I.astype(np.int32), scale_GO, zero_GO, bits)


def bits_into_words(fields_RC: np.ndarray, bits: int) -> np.ndarray:
    """Fields along the last axis as a stream of bits, the least significant first, in int32."""
    stream = (fields_RC[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(len(fields_RC), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32))).reshape(len(fields_RC), -1, 32).astype(np.uint64)
    return (stream << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)


def gptq(weight: Integers, version: int = 1) -> dict[str, np.ndarray]:
    """AutoGPTQ's tensors; v1 has each zero point less one, in its own bits."""
    zero_GO = weight.zero_GO if version == 2 else (weight.zero_GO - 1) % 2**weight.bits
    return {
        "qweight": np.ascontiguousarray(bits_into_words(weight.codes_IO.T, weight.bits).T),
        "qzeros": bits_into_words(zero_GO, weight.bits),
        "scales": weight.scale_GO,
        "g_idx": weight.group_I,
    }


def awq(weight: Integers) -> dict[str, np.ndarray]:
    """AutoAWQ's tensors in the layout `gemm`."""

    def words(fields_RO: np.ndarray) -> np.ndarray:
        eight = fields_RO.reshape(len(fields_RO), -1, 8)[..., list(ORDER)].astype(np.uint64)
        return (eight << np.arange(0, 32, 4, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)

    return {"qweight": words(weight.codes_IO), "qzeros": words(weight.zero_GO), "scales": weight.scale_GO}


@dataclass
class Packed:
    """A packed checkpoint, and the weights that it stands for by the names of their modules."""

    path: Path
    weights: dict[str, Integers] = field(default_factory=dict)


def write(
    dense: Path,
    directory: Path,
    make: Callable[[str, int, int], Integers | None],
    pack: Callable[[Integers], dict[str, np.ndarray]],
    told: dict[str, Any] | None,
    modules: Iterable[str] = ("self_attn", "mlp"),
    transposed: bool = False,
) -> Packed:
    """A copy of a dense checkpoint with packed weights in the place of its matrices.

    Args:
        make: the weight of a module by name, outputs and inputs; None leaves it dense.
        told: `quantization_config` of config.json.
        modules: parts of the names of modules that are packed.
        transposed: matrices are [I, O] in the dense checkpoint.
    """
    shutil.copytree(dense, directory)
    packed = Packed(directory)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        path = name.removesuffix(".weight")
        inside = tensor.ndim == 2 and any(part in path.split(".") for part in modules)
        weight = make(path, *(tensor.T if transposed else tensor).shape) if inside else None
        if weight is None:
            tensors[name] = tensor
            continue
        packed.weights[path] = weight
        tensors |= {f"{path}.{key}": np.ascontiguousarray(value) for key, value in pack(weight).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if told is not None:
        config = json.loads((directory / "config.json").read_text("utf-8"))
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": told}), "utf-8")
    return packed

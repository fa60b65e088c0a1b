"""What frozen modules in a 4-bit codebook (NF4, FP4) have in common: settings, storage, state dict.

Shape suffixes: O out features, I in features, E experts, G blocks, P packed bytes.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314), sections 2 and 3. Codes run over the flattened [O, I] (or [E, O, I]), so
that any width can be stored; on disk a module is bitsandbytes' own keys (quant/bnb_state.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError, ModelError
from finetune.kernels import ops, reference
from finetune.quant.base import FrozenWeight, QuantConfig
from finetune.quant.bnb_state import bnb_state, from_bnb_state

_SCALES = ("absmax", "nested_absmax", "nested_offset")


@dataclass
class Codebook4Config(QuantConfig):
    """Settings that NF4 and FP4 share.

    Attributes:
        block_size: weights under one absmax: a power of two from 32 to 4096.
        double_quant: store absmax itself in 8 bits (QLoRA, section 3): .127 instead of .5 bits a weight at block 64.
        head: quantize the output head as well; a head tied to the embeddings cannot be.
    """

    block_size: int = 64
    double_quant: bool = True
    head: bool = False

    def __post_init__(self) -> None:
        size = self.block_size
        if not 32 <= size <= 4096 or size & (size - 1):
            raise ConfigError(f"quant.block_size is {size}: expected a power of two from 32 to 4096")


class Codebook4(FrozenWeight):
    """Storage common to the linear and the experts: packed codes, absmax, and what double quantization adds.

    Attributes:
        weight: uint8 [P, 1], two codes a byte, the first in the high nibble.
        absmax: float32 [G]; uint8 [G] with double quantization.
        nested_absmax: float32 [ceil(G / 256)] with double quantization, else None.
        nested_offset: float32 [1] with double quantization, else None.
        shape: of the weight as its codes run: (O, I) or (E, O, I).
        dtype: of the weight this stands for; what `.to(dtype)` changes, beside the bias.
    """

    weight: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None

    def __init__(self, config: Codebook4Config, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.codebook = config.name
        self.block_size = config.block_size
        self.double_quant = config.double_quant
        self.shape = shape
        self.dtype = dtype
        self.out_features, self.in_features = shape[-2:]
        count = prod(shape)
        blocks = -(-count // self.block_size)

        def empty(*size: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*size, dtype=kind, device=device)

        codes_P1 = empty((count + 1) // 2, 1, kind=torch.uint8)
        if self.double_quant:
            nested = empty(-(-blocks // reference.NESTED_BLOCK))
            self.hold(reference.Packed4bit(codes_P1, empty(blocks, kind=torch.uint8), nested, empty(1)))
        else:
            self.hold(reference.Packed4bit(codes_P1, empty(blocks)))

    def hold(self, packed: reference.Packed4bit) -> None:
        """Take packed tensors as this module's own, without a copy."""
        for name, tensor in zip(("weight", *_SCALES), packed, strict=True):
            value = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, value)

    def packed(self) -> reference.Packed4bit:
        """The stored tensors, as the kernels take them."""
        return reference.Packed4bit(self.weight, self.absmax, self.nested_absmax, self.nested_offset)

    def store(self, weight: Tensor) -> None:
        """Quantize a dense weight into this module, on its own device, or on the weight's where this one is on meta.

        A linear takes [O, I]; experts take the layout of the parameter they stand for, [E, O, I] or [E, I, O].

        Raises:
            ModelError: when a weight is not finite.
        """
        device = weight.device if self.weight.is_meta else self.weight.device
        weight = self._codes_layout(weight.to(device))
        packed = reference.quantize_4bit(weight, self.codebook, self.block_size, self.double_quant)
        scale = packed.absmax_G if packed.offset is None else packed.offset
        if not scale.isfinite().all():
            raise ModelError(f"a weight of shape {list(self.shape)} holds NaN or infinity: it cannot be quantized")
        self.hold(packed)

    def _decode(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize_4bit(*self.packed(), self.codebook, self.block_size, list(self.shape), dtype)

    def _requantized(self, weight: Tensor, empty: Self) -> Self:
        """`empty` filled with `weight`; with the stored bits where nothing changed."""
        if torch.equal(self._codes_layout(weight).float(), self._decode(torch.float32).to(weight.device)):
            empty.hold(self.packed())
        else:
            empty.store(weight)
        return empty

    def _codes_layout(self, weight: Tensor) -> Tensor:
        """A weight in the order in which its codes run.

        Raises:
            ValueError: when its shape is another than this module's.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"a weight of shape {list(weight.shape)} cannot be stored as {list(self.shape)}")
        return weight

    def bits_per_weight(self) -> float:
        stored = [p for p in self.packed() if p is not None]
        return 8 * sum(p.numel() * p.element_size() for p in stored) / prod(self.shape)

    def settings(self) -> Codebook4Config:
        """The settings of this module, which a checkpoint may have changed."""
        return Codebook4Config(self.codebook, self.block_size, self.double_quant)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but keep codes and scales in their storage dtype whatever `.to(dtype)` asks."""
        stored = {name: self._parameters[name] for name in ("weight", *_SCALES)}
        before = {name: p.data for name, p in stored.items() if p is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        for name, data in before.items():
            moved = self._parameters[name]
            assert moved is not None
            if moved.dtype != data.dtype:
                self.register_parameter(name, nn.Parameter(data.to(moved.device), requires_grad=False))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        bias = self._parameters.get("bias")
        if bias is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()
        if self.weight.is_meta:
            # Not filled yet: a loader that asks which keys it must find is told the dense one.
            destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
            return
        for key, tensor in bnb_state(self).items():
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        bias = self._parameters.get("bias")
        if bias is not None and "bias" not in mine:
            missing_keys.append(prefix + "bias")
        elif bias is not None:
            value = mine.pop("bias").to(device=None if bias.is_meta else bias.device, dtype=bias.dtype)
            if value.shape != bias.shape:
                error_msgs.append(f"{prefix}bias has shape {list(value.shape)}, expected {list(bias.shape)}")
            self.register_parameter("bias", nn.Parameter(value, requires_grad=bias.requires_grad))
        weight = {key: value for key, value in mine.items() if key.split(".")[0] == "weight"}
        unexpected_keys.extend(prefix + key for key in mine if key not in weight)
        if not weight:
            missing_keys.append(prefix + "weight")
            return
        try:
            from_bnb_state(self, weight, prefix)
        except ModelError as error:
            error_msgs.append(str(error))

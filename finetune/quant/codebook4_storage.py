"""What frozen modules in a 4-bit codebook (NF4, FP4) have in common: settings, storage, state dict.

Shape suffixes: O out features, I in features, E experts, G blocks, P packed bytes.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314), sections 2 and 3. Codes run over the flattened [O, I] (or [E, O, I]), so
that any width can be stored; on disk a module is bitsandbytes' own keys (quant/bnb_state.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.kernels import ops, reference
from finetune.quant.base import QuantConfig
from finetune.quant.bnb_state import bnb_state, from_bnb_state
from finetune.quant.codebook4_grid import Codebook4Grid
from finetune.quant.grid import Grid
from finetune.quant.packed import PackedWeight


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


class Codebook4(PackedWeight):
    """Storage common to the linear and the experts: packed codes, absmax, and what double quantization adds.

    Attributes:
        weight: uint8 [P, 1], two codes a byte, the first in the high nibble.
        absmax: float32 [G]; uint8 [G] with double quantization.
        nested_absmax: float32 [ceil(G / 256)] with double quantization, else None.
        nested_offset: float32 [1] with double quantization, else None.
    """

    stored = ("weight", "absmax", "nested_absmax", "nested_offset")
    weight: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None

    def __init__(self, config: Codebook4Config, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None) -> None:
        super().__init__(shape, dtype)
        self.codebook = config.name
        self.block_size = config.block_size
        self.double_quant = config.double_quant
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

    @property
    def storage(self) -> str:  # type: ignore[override]
        """Name of the codebook, for people."""
        return self.codebook

    def packed(self) -> reference.Packed4bit:
        """The stored tensors, as the kernels take them."""
        return reference.Packed4bit(self.weight, self.absmax, self.nested_absmax, self.nested_offset)

    def encode(self, weight: Tensor) -> reference.Packed4bit:
        packed = ops.quantize_4bit(weight, self.codebook, self.block_size, self.double_quant)
        scale = packed.absmax_G if packed.offset is None else packed.offset
        if not scale.isfinite().all():
            raise self._not_finite()
        return packed

    def fit(self, weight: Tensor) -> Codebook4Grid:
        return Codebook4Grid.of(self.encode(weight), self.codebook, self.block_size, self.shape)

    def take(self, grid: Grid, codes: Tensor) -> None:
        assert isinstance(grid, Codebook4Grid)
        self.hold(grid.pack(codes))

    def decode(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize_4bit(*self.packed(), self.codebook, self.block_size, list(self.shape), dtype)

    def settings(self) -> Codebook4Config:
        return Codebook4Config(self.codebook, self.block_size, self.double_quant)

    def packed_state(self) -> dict[str, Tensor]:
        return bnb_state(self)

    def take_state(self, state: dict[str, Tensor], name: str = "") -> None:
        from_bnb_state(self, state, name)

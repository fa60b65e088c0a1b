"""What frozen modules in affine integer codes (int8g, int4, int3, int2) have in common: settings, storage, state dict.

Shape suffixes: O out features, I in features, E experts, G groups of a row, P packed bytes of a row.

Keys on disk, relative to a module (ours; format_version 1): `weight` (uint8 [.., O, P], packed as in
kernels/affine.py), `weight.scale` (float16 or float32 [.., O, G]), where there are zero points `weight.zero` (uint8 or
float32 [.., O, G]), and `weight.finetune_affine`: JSON in a uint8 tensor with bits, group_size, zero_point, dtype and
shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError, ModelError
from finetune.kernels import affine
from finetune.kernels.operand import Operand
from finetune.quant.affine_grid import AffineGrid, clipped_shares
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.facts import FLOATS, facts_of, pack_json, reader, same_shape
from finetune.quant.grid import Grid
from finetune.quant.packed import PackedWeight

FACTS = "weight.finetune_affine"
FORMAT_VERSION = 1
ZERO_POINTS = {"none": None, "integer": torch.uint8, "real": torch.float32}


@dataclass
class AffineConfig(QuantConfig):
    """Settings that the affine formats share; their names say how many bits a code has.

    Attributes:
        group_size: inputs of one output that share a scale: a power of two from 32 to 4096, or -1 for all of them.
            Where it does not divide the inputs, the last group is short.
        symmetric: the codes lie evenly around zero and there are no zero points.
        zero_point: integer | real: a code that stands for 0 (8 bits a group), or the value of code 0 (32 bits a group).
        head: quantize the output head as well; a head tied to the embeddings cannot be.
    """

    group_size: int = 64
    symmetric: bool = False
    zero_point: str = "integer"
    head: bool = False

    def __post_init__(self) -> None:
        size = self.group_size
        if size != -1 and (not 32 <= size <= 4096 or size & (size - 1)):
            raise ConfigError(f"quant.group_size is {size}: expected a power of two from 32 to 4096, or -1")
        if self.zero_point not in ("integer", "real"):
            raise ConfigError(f"quant.zero_point is {self.zero_point}: expected integer or real")
        if self.symmetric and self.zero_point == "real":
            raise ConfigError("quant.symmetric=true has no zero points: expected quant.zero_point=integer, found real")

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS[self.name]

    @property
    def zeros(self) -> str:
        """Which zero points are stored: none, integer or real."""
        return "none" if self.symmetric else self.zero_point


BITS = {"int8g": 8, "int4": 4, "int3": 3, "int2": 2}


class Stored(NamedTuple):
    """The tensors of a weight, as the kernels take them."""

    codes_OP: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None


class Affine(PackedWeight):
    """Storage common to the linear and the experts.

    Attributes:
        weight: uint8 [.., O, P].
        scale: float16 or float32 [.., O, G].
        zero: uint8 or float32 [.., O, G], or None.
        scale_dtype: a dtype that scales have to survive when a weight is stored anew, for checkpoints that hold them in
            it; None asks for nothing.
    """

    stored = ("weight", "scale", "zero")
    weight: nn.Parameter
    scale: nn.Parameter
    zero: nn.Parameter | None

    def __init__(self, config: AffineConfig, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None) -> None:
        super().__init__(shape, dtype)
        self.storage, self.bits, self.group_size = config.name, config.bits, config.group_size
        self.zeros = config.zeros
        self.scale_dtype: torch.dtype | None = None
        rows = shape[:-1]
        scales = (*rows, affine.groups(self.in_features, self.group_size))
        kind = ZERO_POINTS[self.zeros]
        self.hold(
            Stored(
                torch.zeros(*rows, affine.packed_width(self.in_features, self.bits), dtype=torch.uint8, device=device),
                torch.ones(scales, dtype=torch.float16, device=device),
                None if kind is None else torch.zeros(scales, dtype=kind, device=device),
            )
        )

    def packed(self) -> Stored:
        """The stored tensors, as the kernels take them."""
        return Stored(self.weight, self.scale, self.zero)

    def encode(self, weight: Tensor) -> Stored:
        grid = self.fit(weight)
        rows, step = weight.reshape(-1, self.in_features), self.rows_at_a_time
        flat = self._over_rows(grid)
        codes = [
            flat.part(slice(start, start + step)).encode_packed(rows[start : start + step])
            for start in range(0, len(rows), step)
        ]
        return Stored(torch.cat(codes).view(*self.shape[:-1], -1), grid.scale_OG, grid.zero_OG)

    def fit(self, weight: Tensor) -> AffineGrid:
        return self._joined([self._fit(part) for part in self.row_parts(weight)])

    def fit_clipped(self, weight: Tensor) -> AffineGrid:
        parts = [self._fit(w, clipped_shares(w, partial(self._fit, w))) for w in self.row_parts(weight)]
        return replace(self._joined(parts), clipped=True)

    def _joined(self, parts: list[AffineGrid]) -> AffineGrid:
        """The grid of the whole from those of some rows each."""
        exact = any(part.scale_OG.dtype == torch.float32 for part in parts)
        scale = torch.cat([part.scale_OG.float() if exact else part.scale_OG for part in parts])
        if not scale.isfinite().all():
            raise self._not_finite()
        zeros = [part.zero_OG for part in parts if part.zero_OG is not None]

        def shaped(tensor: Tensor) -> Tensor:
            return tensor.view(*self.shape[:-1], -1)

        zero = shaped(torch.cat(zeros)) if zeros else None
        return replace(parts[0], scale_OG=shaped(scale), zero_OG=zero)

    def take(self, grid: Grid, codes: Tensor) -> None:
        assert isinstance(grid, AffineGrid)
        self.hold(Stored(affine.pack(codes, self.bits), grid.scale_OG, grid.zero_OG))

    def _fit(self, w_OI: Tensor, shrink_OG: Tensor | None = None) -> AffineGrid:
        """The grid of some rows."""
        return AffineGrid.fit(
            w_OI,
            self.bits,
            self.group_size,
            symmetric=self.zeros == "none",
            zero_point=self.zeros,
            scale_dtype=self.scale_dtype,
            shrink_OG=shrink_OG,
        )

    @staticmethod
    def _over_rows(grid: AffineGrid) -> AffineGrid:
        """A grid over all rows of a weight, the experts of a stack behind one another."""
        zero = None if grid.zero_OG is None else grid.zero_OG.flatten(0, -2)
        return replace(grid, scale_OG=grid.scale_OG.flatten(0, -2), zero_OG=zero)

    def decode(self, dtype: torch.dtype) -> Tensor:
        return affine.dequantize_affine(*self.packed(), self.bits, self.group_size, list(self.shape), dtype)

    def as_operand(self, stored: Stored) -> Operand:
        """Stored tensors of one matrix as operators take them; absent ones left out."""
        tensors = [tensor for tensor in stored if tensor is not None]
        return Operand(tensors, f"affine:{self.bits}:{self.group_size}", self.out_features, self.in_features)

    def settings(self) -> AffineConfig:
        kind: Any = QUANTIZERS.type_of(self.storage)
        symmetric = self.zeros == "none"
        return kind(group_size=self.group_size, symmetric=symmetric, zero_point="integer" if symmetric else self.zeros)

    def shifted(self, shift_OG: Tensor) -> Self:
        """A new module with these codes and scales whose weights are moved by one number a group, in real zero points.

        QA-LoRA (Xu et al. 2023, arXiv:2309.14717), section 3.3: nothing is rounded but the zero points, to float32.

        Args:
            shift_OG: [.., O, G], experts first also where the stack is transposed.
        """
        scale_OG = self.scale.float()
        if self.zero is None:
            zero_OG = -(2 ** (self.bits - 1)) * scale_OG
        else:
            zero_OG = self.zero.float() if self.zeros == "real" else -self.zero.float() * scale_OG
        moved = self.like(replace(self.settings(), symmetric=False, zero_point="real"))
        moved.hold(Stored(self.weight, self.scale, zero_OG + shift_OG.detach().to(zero_OG)))
        return moved

    def packed_state(self) -> dict[str, Tensor]:
        facts = {
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zeros,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {"weight": self.weight.detach(), "weight.scale": self.scale.detach(), FACTS: pack_json(facts)}
        return state if self.zero is None else state | {"weight.zero": self.zero.detach()}

    def take_state(self, state: dict[str, Tensor], name: str = "") -> None:
        facts = read_facts(state, name)
        same_shape(facts["shape"], self.shape, name)
        rows, width = self.shape[:-1], affine.packed_width(self.in_features, facts["bits"])
        scales = (*rows, affine.groups(self.in_features, facts["group_size"]))
        tensor, kind = reader(state, name, self.weight), ZERO_POINTS[facts["zero_point"]]
        stored = Stored(
            tensor("weight", (*rows, width), torch.uint8),
            tensor("weight.scale", scales, torch.float16, torch.float32),
            None if kind is None else tensor("weight.zero", scales, kind),
        )
        self.bits, self.group_size, self.zeros = facts["bits"], facts["group_size"], facts["zero_point"]
        self.storage = name_of(facts)
        self.dtype = FLOATS[facts["dtype"]]
        self.hold(stored)


def name_of(facts: dict[str, Any]) -> str:
    """The name of the format with that many bits."""
    return next(name for name, bits in BITS.items() if bits == facts["bits"])


def read_facts(state: dict[str, Tensor], name: str = "") -> dict[str, Any]:
    """The settings that a checkpoint's JSON tensor holds, checked.

    Raises:
        ModelError: naming the key and what is wrong with it.
    """
    facts = facts_of(state, name, FACTS, FORMAT_VERSION, ("bits", "group_size", "zero_point"))
    known, size = facts["bits"] in BITS.values() and facts["zero_point"] in ZERO_POINTS, facts["group_size"]
    if not known or not isinstance(size, int) or (size != -1 and size < 1):
        raise ModelError(f"{name}{FACTS} is not a storage we can read: {facts}")
    return facts

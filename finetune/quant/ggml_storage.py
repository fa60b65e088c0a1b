"""What frozen modules in llama.cpp's blocks have in common: settings, storage, state dict.

Shape suffixes: O out features, I in features, E experts, G blocks of a row, P bytes of a row, K weights of a
row that are kept aside.

Keys on disk, relative to a module (ours; format_version 1): `weight`, uint8 [.., O, P], which are the bytes of the
tensor in a GGUF file (kernels/ggml.py), where weights are kept aside `weight.places` (uint8) and `weight.values`
(float16), both [.., O, K], and `weight.finetune_ggml`: JSON in a uint8 tensor with type, dtype, shape and, where there
are any, outliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError, ModelError
from finetune.kernels import ggml
from finetune.kernels.operand import Operand
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.facts import FLOATS, facts_of, pack_json, reader, same_shape
from finetune.quant.ggml_grid import GgmlGrid
from finetune.quant.grid import Grid
from finetune.quant.packed import PackedWeight

FACTS = "weight.finetune_ggml"
FORMAT_VERSION = 1
MOST_OUTLIERS = 8
"""Of a block: with more of them the next wider format is smaller and better."""


@dataclass
class GgmlConfig(QuantConfig):
    """Settings that the blocks share; their names say what a block is.

    Attributes:
        outliers: weights of each block that are kept aside in float16, those furthest from zero: 0 to 8, each 24 bits a
            block. With any of them a block is no longer llama.cpp's.
        head: quantize the output head as well; a head tied to the embeddings cannot be.
    """

    outliers: int = 0
    head: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.outliers <= MOST_OUTLIERS:
            raise ConfigError(f"quant.outliers is {self.outliers}: expected 0 to {MOST_OUTLIERS} weights of a block")


class Stored(NamedTuple):
    """The tensors of a weight, as the kernels take them."""

    blocks_OP: Tensor
    places_OK: Tensor | None
    values_OK: Tensor | None


class Ggml(PackedWeight):
    """Storage common to the linear and the experts.

    Attributes:
        weight: uint8 [.., O, P].
        places: uint8 [.., O, K] in their blocks of the weights that are kept aside, or None.
        values: float16 [.., O, K] of them, or None.
    """

    stored = ("weight", "places", "values")
    weight: nn.Parameter
    places: nn.Parameter | None
    values: nn.Parameter | None

    def __init__(self, config: GgmlConfig, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None) -> None:
        super().__init__(shape, dtype)
        self.storage, self.outliers = config.name, config.outliers
        rows, aside = shape[:-1], (*shape[:-1], ggml.blocks(self.in_features) * self.outliers)

        def empty(size: tuple[int, ...], kind: torch.dtype = torch.uint8) -> Tensor:
            return torch.zeros(size, dtype=kind, device=device)

        blocks_OP = empty((*rows, ggml.packed_width(self.in_features, self.storage)))
        if self.outliers:
            self.hold(Stored(blocks_OP, empty(aside), empty(aside, torch.float16)))
        else:
            self.hold(Stored(blocks_OP, None, None))

    def packed(self) -> Stored:
        """The stored tensors, as the kernels take them."""
        return Stored(self.weight, self.places, self.values)

    def encode(self, weight: Tensor) -> Stored:
        grids = [self._fit(w_RI) for w_RI in self.row_parts(weight)]
        parts = [g.pack(g.round_columns(w_RI, 0)) for g, w_RI in zip(grids, self.row_parts(weight), strict=True)]
        grid = self._joined(grids)
        return Stored(torch.cat(parts).view(*self.shape[:-1], -1), grid.places_OK, grid.values_OK)

    def fit(self, weight: Tensor) -> GgmlGrid:
        return self._joined([self._fit(w_RI) for w_RI in self.row_parts(weight)])

    def take(self, grid: Grid, codes: Tensor) -> None:
        assert isinstance(grid, GgmlGrid)
        self.hold(Stored(grid.pack(codes), grid.places_OK, grid.values_OK))

    def decode(self, dtype: torch.dtype) -> Tensor:
        return ggml.dequantize_ggml(*self.packed(), self.storage, list(self.shape), dtype)

    def as_operand(self, stored: Stored) -> Operand:
        """Stored tensors of one matrix as operators take them; absent ones left out."""
        tensors = [tensor for tensor in stored if tensor is not None]
        return Operand(tensors, f"ggml:{self.storage}", self.out_features, self.in_features)

    def settings(self) -> GgmlConfig:
        kind: Any = QUANTIZERS.type_of(self.storage)
        return kind(outliers=self.outliers)

    def packed_state(self) -> dict[str, Tensor]:
        facts = {
            "format_version": FORMAT_VERSION,
            "type": self.storage,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.places is None or self.values is None:
            return {"weight": self.weight.detach(), FACTS: pack_json(facts)}
        aside = {"weight.places": self.places.detach(), "weight.values": self.values.detach()}
        return {"weight": self.weight.detach(), FACTS: pack_json(facts | {"outliers": self.outliers})} | aside

    def take_state(self, state: dict[str, Tensor], name: str = "") -> None:
        facts = read_facts(state, name)
        same_shape(facts["shape"], self.shape, name)
        tensor, rows, outliers = reader(state, name, self.weight), self.shape[:-1], facts.get("outliers", 0)
        blocks_OP = tensor("weight", (*rows, ggml.packed_width(self.in_features, facts["type"])), torch.uint8)
        places = values = None
        if outliers:
            aside = (*rows, ggml.blocks(self.in_features) * outliers)
            places, values = tensor("weight.places", aside, torch.uint8), tensor("weight.values", aside, torch.float16)
            if not places.is_meta and bool((places >= ggml.BLOCK).any()):
                raise ModelError(f"{name}weight.places names a weight beyond its block of {ggml.BLOCK}")
        self.storage, self.outliers, self.dtype = facts["type"], outliers, FLOATS[facts["dtype"]]
        self.hold(Stored(blocks_OP, places, values))

    def _joined(self, parts: list[GgmlGrid]) -> GgmlGrid:
        """The grid of the whole from those of some rows each."""
        first, *others = parts
        return first.map(lambda *tensors: torch.cat(tensors).view(*self.shape[:-1], -1), *others)

    def _fit(self, w_RI: Tensor) -> GgmlGrid:
        """The grid of some rows.

        Raises:
            ModelError: where float16 cannot hold a scale.
        """
        grid = GgmlGrid.fit(w_RI, self.storage, self.outliers)
        halves = (grid.scale_OG, grid.least_OG, grid.values_OK)
        if all(bool(half.isfinite().all()) for half in halves if half is not None):
            return grid
        if not w_RI.isfinite().all():
            raise self._not_finite()
        raise ModelError(
            f"a weight of shape {list(self.shape)} holds {float(w_RI.abs().max()):.3g}: the float16 scales of "
            f"quant={self.storage} end before, int4 and int8g have others"
        )


def read_facts(state: dict[str, Tensor], name: str = "") -> dict[str, Any]:
    """The settings that a checkpoint's JSON tensor holds, checked.

    Raises:
        ModelError: naming the key and what is wrong with it.
    """
    facts = facts_of(state, name, FACTS, FORMAT_VERSION, ("type",), "blocks")
    outliers = facts.get("outliers", 0)
    if facts["type"] not in ggml.LAYOUTS or not isinstance(outliers, int) or not 0 <= outliers <= MOST_OUTLIERS:
        raise ModelError(f"{name}{FACTS} is not a storage we can read: {facts}")
    return facts

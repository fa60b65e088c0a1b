"""What frozen modules in llama.cpp's blocks have in common: settings, storage, state dict.

Shape suffixes: O out features, I in features, E experts, G blocks of a row, P bytes of a row.

Keys on disk, relative to a module (ours; format_version 1): `weight`, uint8 [.., O, P], which are the bytes of the
tensor in a GGUF file (kernels/ggml.py), and `weight.finetune_ggml`: JSON in a uint8 tensor with type, dtype and shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.kernels import ggml
from finetune.kernels.operand import Operand
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.bnb_state import FLOATS, pack_json, unpack_json
from finetune.quant.ggml_grid import GgmlGrid
from finetune.quant.grid import Grid
from finetune.quant.packed import PackedWeight

FACTS = "weight.finetune_ggml"
FORMAT_VERSION = 1
CHUNK = 1 << 22
"""Weights that are encoded at a time: what bounds the temporaries."""


@dataclass
class GgmlConfig(QuantConfig):
    """Settings that the blocks share; their names say what a block is.

    Attributes:
        head: quantize the output head as well; a head tied to the embeddings cannot be.
    """

    head: bool = False


class Ggml(PackedWeight):
    """Storage common to the linear and the experts.

    Attributes:
        weight: uint8 [.., O, P].
    """

    stored = ("weight",)
    weight: nn.Parameter

    def __init__(self, config: GgmlConfig, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None) -> None:
        super().__init__(shape, dtype)
        self.storage = config.name
        width = ggml.packed_width(self.in_features, self.storage)
        self.hold([torch.zeros(*shape[:-1], width, dtype=torch.uint8, device=device)])

    def encode(self, weight: Tensor) -> list[Tensor]:
        parts = []
        for w_RI in self._parts(weight):
            grid = self._fit(w_RI)
            parts.append(grid.pack(grid.round_columns(w_RI, 0)))
        return [torch.cat(parts).view(*self.shape[:-1], -1)]

    def fit(self, weight: Tensor) -> GgmlGrid:
        parts = [self._fit(w_RI) for w_RI in self._parts(weight)]

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values).view(*self.shape[:-1], -1)

        scale_OG, inverse_OG = joined("scale_OG"), joined("inverse_OG")
        assert scale_OG is not None and inverse_OG is not None
        return GgmlGrid(scale_OG, joined("least_OG"), inverse_OG, joined("start_OG"), self.storage)

    def take(self, grid: Grid, codes: Tensor) -> None:
        assert isinstance(grid, GgmlGrid)
        self.hold([grid.pack(codes)])

    def decode(self, dtype: torch.dtype) -> Tensor:
        return ggml.dequantize_ggml(self.weight, self.storage, list(self.shape), dtype)

    def as_operand(self, blocks_OP: Tensor) -> Operand:
        """Stored blocks of one matrix as operators take them."""
        return Operand([blocks_OP], f"ggml:{self.storage}", self.out_features, self.in_features)

    def settings(self) -> GgmlConfig:
        kind: Any = QUANTIZERS.type_of(self.storage)
        return kind()

    def packed_state(self) -> dict[str, Tensor]:
        facts = {
            "format_version": FORMAT_VERSION,
            "type": self.storage,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        return {"weight": self.weight.detach(), FACTS: pack_json(facts)}

    def take_state(self, state: dict[str, Tensor], name: str = "") -> None:
        facts = read_facts(state, name)
        if tuple(facts["shape"]) != self.shape:
            raise ModelError(f"{name}weight: the checkpoint has shape {facts['shape']}, expected {list(self.shape)}")
        value = state["weight"].detach()
        shape = (*self.shape[:-1], ggml.packed_width(self.in_features, facts["type"]))
        if tuple(value.shape) != shape or value.dtype != torch.uint8:
            found, wanted = f"{list(value.shape)} {value.dtype}", f"{list(shape)} torch.uint8"
            raise ModelError(f"{name}weight is {found}, expected {wanted}")
        self.storage, self.dtype = facts["type"], FLOATS[facts["dtype"]]
        self.hold([value if self.weight.is_meta else value.to(self.weight.device)])

    def _parts(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Some rows at a time."""
        return weight.reshape(-1, self.in_features).split(max(1, CHUNK // self.in_features))

    def _fit(self, w_RI: Tensor) -> GgmlGrid:
        """The grid of some rows.

        Raises:
            ModelError: where float16 cannot hold a scale.
        """
        grid = GgmlGrid.fit(w_RI, self.storage)
        if grid.scale_OG.isfinite().all() and (grid.least_OG is None or grid.least_OG.isfinite().all()):
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
    where = name + FACTS
    if "weight" not in state or FACTS not in state:
        raise ModelError(f"{name}weight: expected blocks and {FACTS}, the checkpoint has {sorted(state)}")
    try:
        facts = unpack_json(state[FACTS])
    except ValueError as error:
        raise ModelError(f"{where} is not JSON: {error}") from error
    needed = {"format_version", "type", "dtype", "shape"}
    if not isinstance(facts, dict) or not needed <= facts.keys():
        raise ModelError(f"{where} does not hold {', '.join(sorted(needed))}: {facts}")
    if facts["format_version"] != FORMAT_VERSION:
        raise ModelError(f"{where} has format_version {facts['format_version']}, this program reads {FORMAT_VERSION}")
    if facts["type"] not in ggml.LAYOUTS or facts["dtype"] not in FLOATS:
        raise ModelError(f"{where} is not a storage we can read: {facts}")
    return facts

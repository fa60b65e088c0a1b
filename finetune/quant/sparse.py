"""Sparse: of a frozen weight only what is not zero is kept, as it is; nothing is rounded.

Shape suffixes: O out features (or any leading dimensions), I in features, E experts, C a run of columns, N kept values,
P bytes of a row.

Each weight is stored in the layout of kernels/sparse.py that takes least room: places in groups of 4, 8 or 16 where N
of every M are zero (2:4: 9 bits a weight), else a bitmask (one bit, and 16 for each that is left). What is not sparse
takes 17 bits. Zeros of a weight that is stored so stay zero in whatever is made of it.

Keys on disk, relative to a module (ours; format_version 1): `weight` (uint8, the places), `weight.values`, and
`weight.finetune_sparse`: JSON in a uint8 tensor with dtype, shape, kept and group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.kernels import affine, sparse
from finetune.kernels.operand import Operand
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.facts import FLOATS, facts_of, pack_json, reader, same_shape
from finetune.quant.grid import Grid
from finetune.quant.packed import PackedExperts, PackedLinear, PackedWeight, builder

FACTS = "weight.finetune_sparse"
FORMAT_VERSION = 1
CLOSE = 1.01
"""Groups are chosen over a bitmask up to so many times its room: weights pruned in groups may have a few more zeros."""


@dataclass
class SparseWeightConfig(QuantConfig):
    """No settings: what is kept is what is not zero (`pruner=...` decides that), in the dtype that the model has."""

    rounds: ClassVar[bool] = False

    name: str = "sparse"


@dataclass(frozen=True)
class ValueGrid:
    """Where kept values lie: on the numbers of a dtype. A code is the value itself."""

    dtype: torch.dtype

    def round_columns(self, w_OC: Tensor, first: int) -> Tensor:
        """The nearest value."""
        return w_OC.to(self.dtype)

    def decode(self, codes_OC: Tensor, first: int = 0) -> Tensor:
        """In float32."""
        return codes_OC.float()

    def part(self, rows: slice) -> Self:
        """The same for all rows."""
        return self

    def expert(self, number: int) -> Self:
        """The same for all experts."""
        return self


class Sparse(PackedWeight):
    """Storage common to the linear and the experts.

    Attributes:
        weight: uint8, the places.
        values: float16, bfloat16 or float32.
        kept, group: as in kernels/sparse.py.
    """

    stored = ("weight", "values")
    storage = "sparse"
    pruned = True
    weight: nn.Parameter
    values: nn.Parameter

    def __init__(
        self, config: SparseWeightConfig, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None
    ) -> None:
        super().__init__(shape, dtype)
        self.kept = self.group = 0
        places = torch.zeros(*shape[:-1], sparse.mask_width(self.in_features), dtype=torch.uint8, device=device)
        self.hold([places, torch.zeros(0, dtype=dtype, device=device)])

    def encode(self, weight: Tensor) -> list[Tensor]:
        return self._compressed(weight.to(self._kind(weight)))

    def fit(self, weight: Tensor) -> ValueGrid:
        return ValueGrid(self._kind(weight))

    def take(self, grid: Grid, codes: Tensor) -> None:
        self.hold(self._compressed(codes))

    def decode(self, dtype: torch.dtype) -> Tensor:
        return sparse.dequantize_sparse(*self._tensors(), self.kept, self.group, list(self.shape), dtype)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.values

    def _kind(self, weight: Tensor) -> torch.dtype:
        """The dtype of the values: the model's, and of a float32 weight the narrowest that holds it exactly."""
        if self.dtype in (torch.float16, torch.bfloat16):
            return self.dtype
        exact = (kind for kind in (torch.bfloat16, torch.float16) if torch.equal(weight.to(kind).to(weight), weight))
        return next(exact, torch.float32)

    def _compressed(self, weight: Tensor) -> list[Tensor]:
        """Places and values of a weight in the dtype of its values; sets the layout."""
        if not weight.isfinite().all():
            raise self._not_finite()
        parts = self.row_parts(weight)
        self.kept, self.group = self._layout(parts, weight.element_size() * 8)
        if self.group:
            pairs = [sparse.compress_groups(part, self.kept, self.group) for part in parts]
        else:
            pairs = [(sparse.pack_mask(part != 0), part[part != 0]) for part in parts]
        places, values = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        rows = self.shape[:-1]
        return [places.view(*rows, -1), values.view(*rows, -1) if self.group else values]

    def _layout(self, parts: Sequence[Tensor], bits: int) -> tuple[int, int]:
        """Kept and group of the layout that takes least room.

        Args:
            bits: of a value.
        """
        count = sum(int((part != 0).sum()) for part in parts)
        best, layout = CLOSE * (count * bits / max(1, sum(map(torch.numel, parts))) + 1), (0, 0)
        for group, place in sparse.PLACE_BITS.items():
            if self.in_features % group:
                break
            kept = max(1, *(sparse.most_kept(part != 0, group) for part in parts))
            room = kept / group * (bits + place)
            if room < best:
                best, layout = room, (kept, group)
        return layout

    def as_operand(self, places_OP: Tensor, values: Tensor) -> Operand:
        """Stored tensors of one matrix as operators take them."""
        return Operand([places_OP, values], f"sparse:{self.kept}:{self.group}", self.out_features, self.in_features)

    def cleared(self) -> Tensor:
        return self.dequantize(self.values.dtype) == 0  # type: ignore[operator]

    def settings(self) -> SparseWeightConfig:
        return SparseWeightConfig()

    def _requantized(self, weight: Tensor, empty: Self) -> Self:
        """With the zeros that are stored; the stored bits where nothing else changed either."""
        stored = self.decode(torch.float32)
        masked = torch.where(stored != 0, self.codes_layout(weight).to(stored), 0)
        if torch.equal(masked, stored):
            empty.kept, empty.group = self.kept, self.group
            empty.hold([self.weight, self.values])
        else:
            empty.hold(empty.encode(masked))
        return empty

    def packed_state(self) -> dict[str, Tensor]:
        facts = {
            "format_version": FORMAT_VERSION,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
            "kept": self.kept,
            "group": self.group,
        }
        return {"weight": self.weight.detach(), "weight.values": self.values.detach(), FACTS: pack_json(facts)}

    def take_state(self, state: dict[str, Tensor], name: str = "") -> None:
        facts = read_facts(state, name)
        same_shape(facts["shape"], self.shape, name)
        kept, group, rows = facts["kept"], facts["group"], self.shape[:-1]
        tensor = reader(state, name, self.weight)
        if group:
            count = self.in_features // group * kept
            width, shape = affine.packed_width(count, sparse.PLACE_BITS[group]), (*rows, count)
            places = tensor("weight", (*rows, width), torch.uint8)
        else:
            places = tensor("weight", (*rows, sparse.mask_width(self.in_features)), torch.uint8)
            bits = 0 if places.is_meta else int(sparse.unpack_mask(places, self.in_features).sum())
            shape = (bits,)
        values = tensor("weight.values", shape, *FLOATS.values())
        self.kept, self.group, self.dtype = kept, group, FLOATS[facts["dtype"]]
        self.hold([places, values])


def read_facts(state: dict[str, Tensor], name: str = "") -> dict[str, Any]:
    """The settings that a checkpoint's JSON tensor holds, checked.

    Raises:
        ModelError: naming the key and what is wrong with it.
    """
    facts = facts_of(state, name, FACTS, FORMAT_VERSION, ("kept", "group"), "places")
    kept, group = facts["kept"], facts["group"]
    whole = isinstance(kept, int) and isinstance(group, int)
    if not whole or not ((kept, group) == (0, 0) or (group in sparse.PLACE_BITS and 0 < kept <= group)):
        raise ModelError(f"{name}{FACTS} is not a storage we can read: {facts}")
    return facts


class SparseLinear(PackedLinear, Sparse):
    """A linear layer of which what is zero takes no room."""

    def forward(self, x_BI: Tensor) -> Tensor:
        return sparse.linear_sparse(x_BI, self.bias, *self._tensors(), self.kept, self.group, self.out_features)

    def operand(self) -> Operand:
        return self.as_operand(*self._tensors())

    def extra_repr(self) -> str:
        layout = f"{self.kept} of {self.group}" if self.group else "bitmask"
        return f"{super().extra_repr()}, {layout}"


class SparseExperts(PackedExperts, Sparse):
    """A stack of expert projections; all have one layout."""

    _starts: list[int] | None = None

    def hold(self, tensors: Sequence[Tensor | None]) -> None:
        super().hold(tensors)
        self._starts = None

    def expert_operand(self, expert: int) -> Operand:
        return self.as_operand(*self._one(expert))

    def decode_expert(self, expert: int) -> Tensor:
        shape = list(self.shape[1:])
        return sparse.dequantize_sparse(*self._one(expert), self.kept, self.group, shape, self.dtype)

    def _one(self, expert: int) -> tuple[Tensor, Tensor]:
        """Places and values of one expert."""
        if self.group:
            return self.weight[expert], self.values[expert]
        if self._starts is None:  # counted once, on first use
            counts = [int(sparse.unpack_mask(places, self.in_features).sum()) for places in self.weight]
            self._starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        return self.weight[expert], self.values[self._starts[expert] : self._starts[expert + 1]]


QUANTIZERS.register(SparseWeightConfig)(builder(SparseLinear, SparseExperts))

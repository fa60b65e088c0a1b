"""What frozen modules in row-wise int8 have in common: settings, storage, state dict in bitsandbytes' keys.

Shape suffixes: O out features, I in features, E experts, K columns of which more is kept.

Keys on disk, relative to a module: `weight` (int8 [.., O, I]), `SCB` (float32 [.., O], the absmax of each row) and
`weight_format` (uint8, 0: row after row), as bitsandbytes 0.50.2 saves a `Linear8bitLt` and stock transformers reads
it. Stacks of experts have the same keys; bitsandbytes has no such module. Where codes lose much of some columns,
`weight.columns` (int32 [K]) and `weight.remainder` (bf16 [O, K]), which others pass over (int8_columns.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError, ModelError
from finetune.kernels import int8
from finetune.kernels.operand import Operand
from finetune.quant.base import QuantConfig
from finetune.quant.facts import reader
from finetune.quant.grid import Grid
from finetune.quant.int8_columns import small_columns
from finetune.quant.int8_grid import Int8Grid
from finetune.quant.packed import PackedWeight

ROW_MAJOR = 0
COLUMNS, REMAINDER = "weight.columns", "weight.remainder"


@dataclass
class Int8Config(QuantConfig):
    """LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): a row of int8 codes under one scale.

    Attributes:
        threshold: magnitude from which an input is an outlier, whose column is multiplied in 16 bits while all others
            are rounded to int8 as well; 0 rounds no inputs (weight-only).
        keep_columns: columns of which the codes lose more than this share keep what is lost, in 16 bits; null: none do.
        head: quantize the output head as well; a head tied to the embeddings cannot be.
    """

    name: str = "int8"
    threshold: float = 6.0
    keep_columns: float | None = 0.1
    head: bool = False

    at_will: ClassVar[tuple[str, ...]] = ("threshold", "keep_columns")

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            raise ConfigError(f"quant.threshold is {self.threshold}: expected 0 (weight-only) or a magnitude above it")
        if self.keep_columns is not None and not 0 < self.keep_columns < 1:
            raise ConfigError(f"quant.keep_columns is {self.keep_columns}: expected a share between 0 and 1, or null")


class Int8(PackedWeight):
    """Storage common to the linear and the experts.

    Attributes:
        weight: int8 [.., O, I].
        SCB: float32 [.., O], as bitsandbytes calls the absmax of a row.
        columns: int32 [K], those of which more is kept, or None.
        remainder: bf16 [O, K], that, or None.
        threshold, keep_columns: as in `Int8Config`.
    """

    stored = ("weight", "SCB", "columns", "remainder")
    storage = "int8"
    weight: nn.Parameter
    SCB: nn.Parameter
    columns: nn.Parameter | None
    remainder: nn.Parameter | None

    def __init__(self, config: Int8Config, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None) -> None:
        super().__init__(shape, dtype)
        self.threshold, self.keep_columns = config.threshold, config.keep_columns
        codes = torch.zeros(shape, dtype=torch.int8, device=device)
        self.hold([codes, torch.zeros(shape[:-1], dtype=torch.float32, device=device), None, None])

    def encode(self, weight: Tensor) -> list[Tensor | None]:
        parts = [int8.quantize_weight(part) for part in self.row_parts(weight)]
        absmax = torch.cat([part.absmax_M for part in parts])
        if not absmax.isfinite().all():
            raise self._not_finite()
        codes = torch.cat([part.codes_MI for part in parts]).view(self.shape)
        grid = self._grid(weight, absmax.view(self.shape[:-1]))
        return [codes, grid.absmax_O, grid.columns_K, grid.remainder(codes)]

    def fit(self, weight: Tensor) -> Int8Grid:
        absmax = weight.to(torch.float16).abs().amax(dim=-1).float()
        if not absmax.isfinite().all():
            raise self._not_finite()
        return self._grid(weight, absmax)

    def _grid(self, weight: Tensor, absmax: Tensor) -> Int8Grid:
        """With the small columns of a linear layer; in a stack of experts each would have its own."""
        columns = None
        if self.keep_columns is not None and weight.dim() == 2:
            columns = small_columns(self.row_parts(weight), absmax, self.keep_columns)
        return Int8Grid(absmax, columns, None if columns is None else weight[:, columns.long()].float())

    def take(self, grid: Grid, codes: Tensor) -> None:
        assert isinstance(grid, Int8Grid)
        self.hold([codes, grid.absmax_O, grid.columns_K, grid.remainder(codes)])

    def decode(self, dtype: torch.dtype) -> Tensor:
        if self.columns is None or self.remainder is None:
            return int8.dequantize_int8(self.weight, self.SCB, list(self.shape), dtype)
        w_OI = int8.dequantize_int8(self.weight, self.SCB, list(self.shape), torch.float32)
        return w_OI.index_add(1, self.columns, self.remainder.float()).to(dtype)

    def as_operand(self, codes_OI: Tensor, absmax_O: Tensor, threshold: float) -> Operand:
        """Stored tensors of one matrix as operators take them."""
        return Operand([codes_OI, absmax_O], f"int8:{threshold}", self.out_features, self.in_features)

    @contextmanager
    def uncoupled(self) -> Iterator[None]:
        """Weight-only: an outlier in one row decides how its column is multiplied in all of them."""
        threshold, self.threshold = self.threshold, 0.0
        try:
            yield
        finally:
            self.threshold = threshold

    def settings(self) -> Int8Config:
        return Int8Config(threshold=self.threshold, keep_columns=self.keep_columns)

    def packed_state(self) -> dict[str, Tensor]:
        layout = torch.tensor(ROW_MAJOR, dtype=torch.uint8)
        state = {"weight": self.weight.detach(), "SCB": self.SCB.detach(), "weight_format": layout}
        if self.columns is None or self.remainder is None:
            return state
        return state | {COLUMNS: self.columns.detach(), REMAINDER: self.remainder.detach()}

    def take_state(self, state: dict[str, Tensor], name: str = "") -> None:
        tensor = reader(state, name, self.weight)
        layout = int(state.get("weight_format", torch.tensor(ROW_MAJOR)))
        if layout != ROW_MAJOR:
            raise ModelError(f"{name}weight_format is {layout}: expected {ROW_MAJOR} (rows); save it with bitsandbytes")
        columns = remainder = None
        if COLUMNS in state:
            count = len(state[COLUMNS])
            columns = tensor(COLUMNS, (count,), torch.int32)
            remainder = tensor(REMAINDER, (self.out_features, count), torch.bfloat16)
            if not columns.is_meta and not bool(((columns >= 0) & (columns < self.in_features)).all()):
                raise ModelError(f"{name}{COLUMNS} names a column beyond the {self.in_features} that there are")
        codes = tensor("weight", self.shape, torch.int8)
        self.hold([codes, tensor("SCB", self.shape[:-1], torch.float32), columns, remainder])

    def _is_key(self, key: str) -> bool:
        return key in ("weight", "SCB", "weight_format", COLUMNS, REMAINDER)

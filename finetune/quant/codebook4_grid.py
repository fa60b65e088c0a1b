"""The grid of a 4-bit codebook (NF4, FP4): the table's values times the absmax that is stored.

Shape suffixes: E experts, O out features, I in features, G blocks, C a run of columns.

Blocks run over the flattened weight, so a column crosses as many of them as it has rows. With double quantization the
absmax is what its own 8-bit code decodes to: codes chosen here are nearest to what will be decoded. (bitsandbytes, and
so `store`, chooses them for the absmax before that second rounding.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Self

import torch
from torch import Tensor

from finetune.kernels import codebook as books
from finetune.kernels import reference


@dataclass(frozen=True)
class Codebook4Grid:
    """Where the codes of a weight lie.

    Attributes:
        packed: absmax, nested absmax and offset as stored; its codes are those that rounding to nearest gave.
        absmax_G: float32, decoded.
        codebook: nf4 | fp4.
        block_size: weights under one absmax.
        shape: of the weight that this grid is for: (O, I) or (E, O, I).
        start: number of its first weight in the flattened one that the blocks run over.
    """

    packed: reference.Packed4bit
    absmax_G: Tensor
    codebook: str
    block_size: int
    shape: tuple[int, ...]
    start: int = 0

    @classmethod
    def of(cls, packed: reference.Packed4bit, codebook: str, block_size: int, shape: tuple[int, ...]) -> Self:
        """The grid of a weight as it is stored."""
        return cls(packed, reference.decode_absmax(*packed[1:]), codebook, block_size, shape)

    def part(self, rows: slice) -> Self:
        """Some rows of a matrix; the first and the last block may be shared with others."""
        first, last, _ = rows.indices(self.shape[0])
        return replace(self, shape=(last - first, self.shape[1]), start=self.start + first * self.shape[1])

    def expert(self, number: int) -> Self:
        """The part of one expert; its blocks may be shared with its neighbours."""
        matrix = self.shape[1:]
        return replace(self, shape=matrix, start=self.start + number * matrix[0] * matrix[1])

    @property
    def group(self) -> int | None:
        """Weights of a block, where every row holds whole blocks; else None."""
        return self.block_size if self.shape[-1] % self.block_size == 0 else None

    def refit(self, w_OC: Tensor, first: int) -> Self:
        """The grid whose blocks from the column `first` on have these weights' absmax, in 8 bits within the nested
        ranges there are where it is stored so."""
        rows, width = self.shape
        place_O = (torch.arange(0, rows * width, width, device=w_OC.device) + first + self.start) // self.block_size
        absmax_O = w_OC.float().abs().amax(dim=1)
        packed = self.packed
        if packed.nested_absmax is None or packed.offset is None:
            return self._with(place_O, absmax_O, absmax_O)
        nested_O = packed.nested_absmax[place_O // reference.NESTED_BLOCK]
        codes_O = reference.nested_codes(absmax_O - packed.offset, nested_O)
        values_O = books.dynamic_map(w_OC.device)[codes_O.int()] * nested_O + packed.offset
        return self._with(place_O, codes_O, values_O)

    def with_expert(self, number: int, part: Self) -> Self:
        """The grid of a stack with another one for one of its experts."""
        first, count = part.start // self.block_size, prod(part.shape) // self.block_size
        place_G = torch.arange(first, first + count, device=self.absmax_G.device)
        return self._with(place_G, part.packed.absmax_G[place_G], part.absmax_G[place_G])

    def _with(self, place: Tensor, stored: Tensor, decoded: Tensor) -> Self:
        """The grid with another absmax for some blocks."""
        packed = self.packed._replace(absmax_G=self.packed.absmax_G.index_copy(0, place, stored))
        return replace(self, packed=packed, absmax_G=self.absmax_G.index_copy(0, place, decoded))

    def round_columns(self, w_OC: Tensor, first: int) -> Tensor:
        """The nearest codes, uint8; half way between two values, the lower one."""
        absmax_OC = self._absmax(first, w_OC.shape[-1])
        # The reciprocal, as in rounding to nearest (kernels/reference.py): a quotient would turn a few ties over.
        unit_OC = w_OC.float() * absmax_OC.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
        values, order = books.table(self.codebook, w_OC.device).sort(stable=True)
        return order.to(torch.uint8)[torch.bucketize(unit_OC.contiguous(), books.midpoints(values))]

    def decode(self, codes_OC: Tensor, first: int = 0) -> Tensor:
        """`table[code] * absmax` in float32."""
        table = books.table(self.codebook, codes_OC.device)
        return table[codes_OC.int()] * self._absmax(first, codes_OC.shape[-1])

    def pack(self, codes: Tensor) -> reference.Packed4bit:
        """Codes of the whole weight as they are stored: the first of two in the high nibble; an odd one beside zero."""
        flat = codes.reshape(-1)
        if flat.numel() % 2:
            zero = int((books.table(self.codebook, flat.device) == 0).nonzero()[0])
            flat = torch.nn.functional.pad(flat, (0, 1), value=zero)
        return self.packed._replace(codes_P1=(flat[::2] << 4 | flat[1::2]).unsqueeze(1))

    def _absmax(self, first: int, count: int) -> Tensor:
        """The absmax of a run of columns, [.., O, C]."""
        *rows, width = self.shape
        device = self.absmax_G.device
        row = torch.arange(torch.Size(rows).numel(), device=device).view(*rows, 1) * width
        place = row + torch.arange(first, first + count, device=device) + self.start
        return self.absmax_G[place // self.block_size]

"""Where virtual positions stand among real ones, and what becomes of everything that has a column for each.

One row in a sequence: its virtual positions come first, or right before its first token where it is padded on the left.
Rows packed into one sequence: each has virtual positions of its own before its first token. So each reads what it would
read alone.

Shape suffixes: B sequences, S real columns, L virtual positions of a row, T all columns, H features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from finetune.errors import ConfigError


class Layout(ABC):
    """Real and virtual columns of one forward pass.

    Attributes:
        length: L.
        real: S.
        total: T.
    """

    length: int
    real: int
    total: int

    @abstractmethod
    def join(self, virtual_LH: Tensor, real_BSH: Tensor) -> Tensor:
        """[B, T, H]: the virtual positions set in among real ones."""

    @abstractmethod
    def replace(self, all_BTH: Tensor, virtual_LH: Tensor) -> Tensor:
        """[B, T, H] with other values at the virtual positions."""

    @abstractmethod
    def keep(self, all_BT: Tensor) -> Tensor:
        """[B, S, ...]: the real columns of [B, T, ...]."""

    @abstractmethod
    def spread(self, real_BS: Tensor) -> Tensor:
        """[B, T]: something that tokens have (their type); virtual positions have 0."""

    @abstractmethod
    def positions(self, real_BS: Tensor) -> Tensor:
        """[..., T]: virtual positions count from 0, and real ones go on behind them."""

    @abstractmethod
    def mask(self, mask: Tensor) -> Tensor:
        """An attention mask [B, S] or [B, H, S, S] with the virtual columns in it."""


class Ahead(Layout):
    """Virtual positions before everything: one row in each sequence."""

    def __init__(self, length: int, real: int) -> None:
        self.length, self.real, self.total = length, real, length + real

    def join(self, virtual_LH: Tensor, real_BSH: Tensor) -> Tensor:
        """Virtual ones in front."""
        return torch.cat([virtual_LH.expand(real_BSH.shape[0], -1, -1), real_BSH], dim=1)

    def replace(self, all_BTH: Tensor, virtual_LH: Tensor) -> Tensor:
        """Others in front."""
        return self.join(virtual_LH, self.keep(all_BTH))

    def keep(self, all_BT: Tensor) -> Tensor:
        """What is behind them."""
        return all_BT[:, self.length :]

    def spread(self, real_BS: Tensor) -> Tensor:
        """Zeros in front."""
        return torch.cat([real_BS.new_zeros(*real_BS.shape[:-1], self.length), real_BS], dim=-1)

    def positions(self, real_BS: Tensor) -> Tensor:
        """Counted in front."""
        count_L = torch.arange(self.length, dtype=real_BS.dtype, device=real_BS.device)
        return torch.cat([count_L.expand(*real_BS.shape[:-1], -1), real_BS + self.length], dim=-1)

    def mask(self, mask: Tensor) -> Tensor:
        """Every position sees the virtual ones, these see one another causally."""
        if mask.dim() == 2:
            return torch.cat([mask.new_ones(mask.shape[0], self.length), mask], dim=1)
        source_T = torch.arange(self.total, device=mask.device)
        return _widened(mask, source_T[None], torch.ones_like(source_T)[None], self.length)


class Between(Layout):
    """Virtual positions right before the first token of each row of a sequence.

    What is before the first row of a sequence stays there. Sequences with fewer rows than others are filled up at their
    end; what fills belongs to no row.

    Args:
        length: virtual positions of each row.
        starts_BS: True where a row begins.
    """

    def __init__(self, length: int, starts_BS: Tensor) -> None:
        batch, real = starts_BS.shape
        rows_BS = starts_BS.cumsum(dim=1)
        device = starts_BS.device
        self.length, self.real = length, real
        self.total = real + length * int(rows_BS[:, -1].max())
        self.real_BS = torch.arange(real, device=device) + length * rows_BS
        b, s = starts_BS.nonzero(as_tuple=True)
        virtual_RL = (self.real_BS[b, s] - length)[:, None] + torch.arange(length, device=device)
        self.filler = length + real
        # Of each column: 0 .. L - 1 a virtual position, L + s the real one s, L + S what fills up.
        self.source_BT = torch.full((batch, self.total), self.filler, device=device)
        self.source_BT.scatter_(1, self.real_BS, (torch.arange(real, device=device) + length).expand(batch, -1))
        self.source_BT[b[:, None], virtual_RL] = torch.arange(length, device=device).expand(len(b), -1)
        self.rows_BT = torch.zeros_like(self.source_BT).scatter_(1, self.real_BS, rows_BS)
        self.rows_BT[b[:, None], virtual_RL] = rows_BS[b, s][:, None]

    def join(self, virtual_LH: Tensor, real_BSH: Tensor) -> Tensor:
        """Gathered from both; zeros fill up."""
        batch, _, features = real_BSH.shape
        filler_BH = real_BSH.new_zeros(batch, 1, features)
        table_BXH = torch.cat([virtual_LH.expand(batch, -1, -1), real_BSH, filler_BH], dim=1)
        return table_BXH.gather(1, self.source_BT[:, :, None].expand(-1, -1, features))

    def replace(self, all_BTH: Tensor, virtual_LH: Tensor) -> Tensor:
        """Others at the virtual positions."""
        values_BTH = virtual_LH[self.source_BT.clamp(max=self.length - 1)]
        return torch.where((self.source_BT < self.length)[:, :, None], values_BTH, all_BTH)

    def keep(self, all_BT: Tensor) -> Tensor:
        """The real columns in their order."""
        index = self.real_BS.view(*self.real_BS.shape, *[1] * (all_BT.dim() - 2))
        return all_BT.gather(1, index.expand(-1, -1, *all_BT.shape[2:]))

    def spread(self, real_BS: Tensor) -> Tensor:
        """Zeros at virtual positions."""
        return torch.zeros_like(self.source_BT, dtype=real_BS.dtype).scatter_(1, self.real_BS, real_BS)

    def positions(self, real_BS: Tensor) -> Tensor:
        """Counted anew in each row; what fills up stays at 0, which every model has and keeps apart from rows."""
        virtual_BT = torch.where(self.source_BT < self.length, self.source_BT, 0).to(real_BS.dtype)
        return virtual_BT.scatter_(1, self.real_BS, real_BS.expand(len(virtual_BT), -1) + self.length)

    def mask(self, mask: Tensor) -> Tensor:
        """Of each row, every position sees its virtual ones."""
        if mask.dim() == 2:
            return (self.source_BT < self.length).to(mask.dtype).scatter_(1, self.real_BS, mask)
        return _widened(mask, self.source_BT, self.rows_BT, self.length)


def _widened(mask_BHSS: Tensor, source_BT: Tensor, rows_BT: Tensor, length: int) -> Tensor:
    """A mask over all columns, made of one over the real ones.

    Args:
        mask_BHSS: True or 0 where a position may look, False or the dtype's minimum elsewhere; of a causal model.
        source_BT: of each column, L + s where it is the real one s.
        rows_BT: the row of each column.
    """
    if mask_BHSS.dim() != 4:
        raise ConfigError(
            f"the attention mask has {mask_BHSS.dim()} dimensions: an adapter before the text takes [rows, positions],"
            " or [rows, heads, positions, positions]"
        )
    batch, real = max(len(mask_BHSS), len(source_BT)), mask_BHSS.shape[-1]
    source_BT = source_BT.expand(batch, -1)
    total = source_BT.shape[1]
    real_BT = (source_BT >= length) & (source_BT < length + real)
    place_BT = torch.where(real_BT, source_BT - length, 0)
    heads = mask_BHSS.shape[1]
    given = mask_BHSS.expand(batch, -1, -1, -1)
    given = given.gather(2, place_BT[:, None, :, None].expand(-1, heads, -1, real))
    given = given.gather(3, place_BT[:, None, None, :].expand(-1, heads, total, -1))
    causal_TT = torch.ones(total, total, dtype=torch.bool, device=given.device).tril()
    seen_BTT = (rows_BT[:, :, None] == rows_BT[:, None, :]) & causal_TT
    shut = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
    own = torch.full_like(given, shut).masked_fill(seen_BTT[:, None], given.dtype == torch.bool)
    both_BTT = real_BT[:, :, None] & real_BT[:, None, :]
    return torch.where(both_BTT[:, None], given, own)

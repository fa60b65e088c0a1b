"""Single rows of the token embedding that train: PEFT's `trainable_token_indices`.

What is trained stands in the place of the stored rows, as in PEFT (`tuners/trainable_tokens`): rows of a table that was
given new tokens hold whatever that has put there. A head that shares the table uses the same rows.

Shape suffixes: B leading dimensions, N trained rows, V vocabulary, H hidden features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters.adapted import AdaptedWeight
from finetune.adapters.lookup import AdaptedLookup
from finetune.adapters.mounting import SeenThrough, ground


class TokenRows(AdaptedWeight):
    """A table, some of whose rows train.

    Attributes:
        rows_NH: in the place of the stored ones.
    """

    base: Any
    ids_N: Tensor

    def take_rows(self, ids: Sequence[int], rows_NH: nn.Parameter | None) -> None:
        """Train these rows, from the stored ones; or use those that train elsewhere."""
        table_VH = self.table
        self.register_buffer("ids_N", torch.tensor(list(ids), device=table_VH.device), persistent=False)
        self.rows_NH = nn.Parameter(self.stored_NH()) if rows_NH is None else rows_NH

    @property
    def table(self) -> Tensor:
        """The stored table [V, H]."""
        table: Any = ground(self.base)
        table_VH: Tensor = table.weight.detach()
        return table_VH

    def stored_NH(self) -> Tensor:
        """The stored rows, in float32."""
        return self.table[self.ids_N].to(torch.float32, copy=True)

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The table with the trained rows in it."""
        below = self.below()
        table_VH = below.pop("weight", None)
        table_VH = self.table.float() if table_VH is None else table_VH
        yield "weight", table_VH.index_copy(0, self.ids_N, self.rows_NH.detach().float())
        yield from below.items()


class EmbeddingRows(TokenRows, AdaptedLookup):
    """The token embedding with some rows trained."""

    def __init__(self, base: nn.Embedding, ids: Sequence[int], rows_NH: nn.Parameter | None = None) -> None:
        AdaptedLookup.__init__(self, base)
        self.take_rows(ids, rows_NH)

    def forward(self, ids_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The looked-up rows [B, H], in the dtype of the table; the base's own while disabled."""
        found_BH: Tensor = self.base(ids_B, *args, **kwargs)
        if not self.enabled:
            return found_BH
        same_BN = ids_B[..., None] == self.ids_N
        rows_BH = F.embedding(same_BN.int().argmax(-1), self.rows_NH).to(found_BH.dtype) * self.factor(found_BH.dtype)
        return torch.where(same_BN.any(-1, keepdim=True), rows_BH, found_BH)


class HeadRows(TokenRows, SeenThrough):
    """The output head with some rows trained."""

    def __init__(self, base: nn.Linear, ids: Sequence[int], rows_NH: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.base, self.enabled = base, True
        self.in_features, self.out_features = base.in_features, base.out_features
        self.take_rows(ids, rows_NH)

    def forward(self, x_BH: Tensor) -> Tensor:
        """Scores [B, V], those of the trained rows moved by what they have learnt; the base's own while disabled."""
        y_BV: Tensor = self.base(x_BH)
        if not self.enabled:
            return y_BV
        learnt_NH = (self.rows_NH - self.stored_NH()).to(x_BH.dtype)
        return y_BV.index_add(-1, self.ids_N, F.linear(x_BH, learnt_NH))

"""Fewer attention heads: a head of keys and values goes with the heads of queries that it serves.

So the number of queries to a key stays what it is, and with it the configuration valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.errors import ConfigError, ModelError
from finetune.quant.pruners.base import PRUNERS
from finetune.quant.pruners.cut import part_of
from finetune.quant.pruners.narrow import Narrow
from finetune.quant.pruners.slices import Layout
from finetune.quant.pruners.units import NarrowConfig
from finetune.structure.base import Projection
from finetune.structure.widths import Build, heads_of, narrow_heads


@dataclass
class HeadsConfig(NarrowConfig):
    """Settings of cutting heads."""

    name: str = "heads"


@PRUNERS.register(HeadsConfig)
class HeadsCut(Narrow):
    """Takes heads of keys and values out of every block, with their queries."""

    what = "heads"

    def narrowed(self, model: nn.Module, build: Build) -> Any:
        self._heads = heads_of(model)
        groups = self._heads.groups
        gone = part_of(self.settings.sparsity, groups)
        if not gone:
            raise ConfigError(
                f"pruner.sparsity is {self.settings.sparsity}, which is none of the {groups} heads of keys and values"
                f" that {type(model).__name__} has: "
                + (f"expected {1 / groups:.4g} or more" if groups > 1 else "heads cannot be cut where there is one")
            )
        try:
            return narrow_heads(model, self._heads, groups - gone, build)
        except ModelError:
            self._refuse_share(model, groups - gone, build)
            raise

    def _refuse_share(self, model: nn.Module, stay: int, build: Build) -> None:
        """Name a share that can be had where this one cannot: families whose width their heads have to divide.

        Raises:
            ConfigError: where there is one.
        """
        groups = self._heads.groups
        other = max((n for n in range(1, groups) if groups % n == 0 and n != stay), default=0)
        try:
            if other:
                narrow_heads(model, self._heads, other, build)
        except ModelError:
            return
        if other:
            raise ConfigError(
                f"pruner.sparsity is {self.settings.sparsity}, but no configuration gives {type(model).__name__} {stay}"
                f" of its {groups} heads of keys and values: expected {1 - other / groups:.4g}, which leaves {other}"
            )

    def units(self, reader: Projection) -> int:
        return self._heads.groups

    def fused(self) -> Sequence[Layout]:
        heads = self._heads
        queries = heads.queries // heads.groups * heads.key_width
        return [(queries, heads.key_width, heads.value_width)]

"""Who has the blocks of a model in memory while the driver goes from one to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from finetune.quant.dense import DenseConfig
from finetune.quant.freeze import freeze
from finetune.quant.layer import Layer
from finetune.quant.replay import Batch, Calls, Sink, record
from finetune.structure.base import Structure


class Resident:
    """All of them, all the time; a sub-class may bring in one block at a time.

    Attributes:
        finished: blocks that an earlier run has finished.
        layers: what became of their projections.
    """

    def __init__(self) -> None:
        self.finished = 0
        self.layers: list[Layer] = []

    def begin(self, model: nn.Module, structure: Structure) -> None:
        """Make every projection of a model that is in memory a dense frozen module."""
        freeze(model, DenseConfig(), structure)

    def calls(self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch]) -> Calls:
        """How a stack calls its blocks; `hidden` is what goes into the first one that is not finished."""
        return record(model, blocks, batches)

    def enter(self, number: int, block: str) -> None:
        """Have a block in memory, in its place in the model, dense."""

    def onward(self, number: int, hidden: Iterator[Tensor]) -> Sink:
        """Keep what goes into a block, for each batch, until that block's turn."""
        return list(hidden)

    def leave(self, number: int, block: str, layers: Sequence[Layer]) -> None:
        """A block is quantized, and its output known; nothing asks for it again."""

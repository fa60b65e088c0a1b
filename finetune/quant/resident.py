"""Who has the blocks of a model in memory while the driver goes from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseConfig, DenseExperts, DenseLinear
from finetune.quant.freeze import empty_frozen, freeze
from finetune.quant.layer import Layer
from finetune.quant.packed import PackedWeight
from finetune.quant.replay import Batch, Calls, Enough, Sink, inputs_of, record
from finetune.structure.base import Projection, Structure


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

    def survey(
        self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch]
    ) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Go through the blocks of the model as it is: for each, what goes in and what comes out, batch by batch.

        Each block's pairs are to be taken before the next block is asked for.
        """
        calls = record(model, blocks, batches)
        for number, name in enumerate(blocks):
            if not calls.chained[number]:
                calls.hidden = inputs_of(model, name, batches)
            after: list[Tensor] = []
            yield pairs(calls, number, model.get_submodule(name), after)
            calls.hidden = after

    def enter(self, number: int, block: str) -> None:
        """Have a block in memory, in its place in the model, dense."""

    def keep(self, lane: str, number: int, hidden: Iterator[Tensor]) -> Sink:
        """Keep hidden states, for each batch, until a block is left.

        Args:
            lane: what they are, of several that are kept at a time.
            number: of the block.
        """
        return list(hidden)

    def kept(self, lane: str, number: int) -> Sink:
        """Hidden states that an earlier run kept for the first block that is not finished."""
        return []

    def leave(self, number: int, block: str, layers: Sequence[Layer]) -> None:
        """A block is quantized, and its output known; nothing asks for it again."""

    def predict(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Run the model, its blocks quantized, no further than what is looked at."""
        for batch in batches:
            with suppress(Enough):
                model(**batch)


@torch.no_grad()
def pairs(calls: Calls, number: int, block: nn.Module, after: Sink) -> Iterator[tuple[Tensor, Tensor]]:
    """What goes into a block and what comes out, batch by batch; what comes out is kept."""
    for before, output in zip(calls.hidden, calls.forward(number, block)(), strict=True):
        after.append(output)
        yield before, output


def lay_out(
    model: nn.Module, quant: QuantConfig, p: Projection, prepare: Callable[[PackedWeight], None], sparsity: float
) -> None:
    """Put the module in place that a projection of a finished block is stored in, without its weight.

    Args:
        model: whose projection is a dense frozen module on the meta device.
        prepare: as the driver's.
        sparsity: share of its weights that are zero.
    """
    dense = model.get_submodule(p.name)
    assert isinstance(dense, DenseLinear | DenseExperts)
    frozen = empty_frozen(quant, p, dense, dtype=dense.weight.dtype, device="cpu")
    if not isinstance(frozen, PackedWeight):
        return
    prepare(frozen)
    # Whatever has as many zeros, evenly spread, takes the same room; only how much it is will be asked.
    shape = dense.weight.shape if p.kind == "experts" else (p.out_features, p.in_features)
    places = torch.arange(dense.weight.numel() + 1, dtype=torch.float64) * (1 - sparsity)
    frozen.store((places + 1e-6).floor().diff().view(shape).to(dense.weight.dtype))
    parent, _, leaf = p.name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, frozen.to("meta"))

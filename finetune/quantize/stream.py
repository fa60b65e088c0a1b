"""One block in memory at a time: read from the checkpoint, quantized, put on disk, dropped.

Text that quality is measured on goes along: through each block while it is dense, and again once it is quantized, so
that both models' last hidden states are known in the end and neither was ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.rows import Batch as Rows
from finetune.export.merge import Stock
from finetune.model.blocks import BlockReader
from finetune.quant.driver import CALIBRATION
from finetune.quant.layer import Layer
from finetune.quant.replay import Batch, Calls, Enough, Sink
from finetune.quant.resident import Resident, pairs
from finetune.quant.standins import Answer, ending, rehearse
from finetune.quantize.measure import Figures, Measure
from finetune.quantize.state import State
from finetune.quantize.write import stock_tensors
from finetune.structure.base import Structure

DENSE, QUANTIZED, SURVEY = "dense", "quantized", "survey"
"""Names of the lanes, beside those of the driver, of held-out text in the dense and in the quantized model, and of
calibration text that goes through the dense model before the first block is worked on."""


class OneBlock(Resident):
    """Brings blocks in and out, and knows what an earlier run has finished.

    Args:
        reader: of the checkpoint; `outside` has been called.
        structure: of its model.
        state: where finished blocks are kept.
        answer: what `standins.answer_of` said.
        rows: held-out text, none to measure nothing.
        measure: what of a model's answers is compared.
        in_public: as in `write`.
        summary: what is to be saved with a block beside its projections.
    """

    def __init__(
        self,
        reader: BlockReader,
        structure: Structure,
        state: State,
        answer: Answer,
        rows: Sequence[Rows],
        measure: Measure,
        in_public: bool,
        summary: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__()
        self.reader, self.structure, self.state, self.answer, self.rows = reader, structure, state, answer, rows
        self.measure, self.in_public, self.summary = measure, in_public, summary
        self.model, self.device = reader.model, torch.device(reader.device)
        self.finished, self.layers = state.finished, state.layers
        self._stock = Stock.of(self.model)
        self._followers: dict[str, Calls] = {}
        self._head = self.model.get_submodule(structure.head) if structure.head else None  # dense, to compare with

    def begin(self, model: nn.Module, structure: Structure) -> None:
        """See how held-out text goes through the blocks."""
        blocks = structure.stacks[0].blocks
        inputs = [row.to(self.device).model_inputs() for row in self.rows]
        if not inputs:
            return
        calls = self._rehearsed(DENSE, blocks, inputs)
        hidden = self.state.lane(QUANTIZED, self.finished, self.device) if self.finished else calls.hidden
        # The arguments are the same ones: the lists of the two are emptied apart.
        self._followers = {DENSE: calls, QUANTIZED: Calls(list(calls.arguments), hidden, calls.chained)}

    def calls(self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch]) -> Calls:
        return self._rehearsed(CALIBRATION, blocks, batches)

    def _rehearsed(self, lane: str, blocks: Sequence[str], batches: Sequence[Batch]) -> Calls:
        """How blocks are called, and what goes into the first one that is not finished."""
        first: Sink = _Nowhere() if self.finished else self.state.new_lane(lane, 0, self.device)
        calls = rehearse(self.model, blocks, batches, self.answer, first)
        if self.finished:
            calls.hidden = self.state.lane(lane, self.finished, self.device)
        self.reader.release()
        return calls

    def survey(
        self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch]
    ) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        calls = rehearse(self.model, blocks, batches, self.answer, self.state.new_lane(SURVEY, 0, self.device))
        for number, name in enumerate(blocks):
            after = self.state.new_lane(SURVEY, number + 1, self.device)
            yield pairs(calls, number, self.reader.read(name), after)
            self.reader.release()
            self.state.drop_lane(SURVEY, number)
            calls.hidden, calls.arguments[number] = after, []
        self.state.drop_lane(SURVEY, len(blocks))

    def enter(self, number: int, block: str) -> None:
        _put(self.model, block, self.reader.read(block))
        self._follow(DENSE, number, block)

    def keep(self, lane: str, number: int, hidden: Iterator[Tensor]) -> Sink:
        return self._spilled(lane, number, hidden)

    def kept(self, lane: str, number: int) -> Sink:
        return self.state.lane(lane, number, self.device)

    def leave(self, number: int, block: str, layers: Sequence[Layer]) -> None:
        self._follow(QUANTIZED, number, block)
        held = any(True for _ in self.model.get_submodule(block).parameters())  # none where the block was cut out
        names = [name for name in self._stock.names if held and name.startswith(f"{block}.")]
        dtype = self.reader.loading.dtype
        stored = {n: list(stock_tensors(self.model, self._stock, n, dtype, self.in_public)) for n in names}
        self.state.save(number, stored, layers, self.summary())
        self.model.get_submodule(block).to("meta")
        self.reader.release()

    def predict(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        blocks = self.structure.stacks[0].blocks
        hidden = self.state.lane(CALIBRATION, len(blocks), self.device)
        with ending(model, blocks, self.answer) as give:
            for batch, states in zip(batches, hidden, strict=True):
                give(states)
                with suppress(Enough):
                    model(**batch)

    def quality(self) -> Figures | None:
        """The quantized model against the dense one on the held-out text; None without any."""
        if not self.rows:
            return None
        comparison = self.measure.comparison()
        dense, quantized = self._followers[DENSE].hidden, self._followers[QUANTIZED].hidden
        with ending(self.model, self.structure.stacks[0].blocks, self.answer) as give:

            def after(hidden: Tensor, head: nn.Module | None) -> Any:
                def model(**inputs: Any) -> Any:
                    give(hidden)
                    with self._headed(head):
                        return self.model(**inputs)

                return model

            for row, one, other in zip(self.rows, dense, quantized, strict=True):
                answers = (after(one, self._head), after(other, None))
                pair = [self.measure.seen(model, [row], self.device) for model in answers]
                for before, now in zip(*pair, strict=True):
                    comparison.add(before, now)
        return comparison.figures()

    @contextmanager
    def _headed(self, head: nn.Module | None) -> Iterator[None]:
        """Within it, the model has another head; None leaves its own."""
        name = self.structure.head
        if head is None or name is None:
            yield
            return
        own = self.model.get_submodule(name)
        _put(self.model, name, head)
        try:
            yield
        finally:
            _put(self.model, name, own)

    def _follow(self, lane: str, number: int, block: str) -> None:
        """Take held-out text through a block as it is now."""
        calls = self._followers.get(lane)
        if calls is not None:
            with torch.no_grad():
                forward = calls.forward(number, self.model.get_submodule(block))
                calls.hidden = self._spilled(lane, number + 1, forward())
            calls.arguments[number] = []

    def _spilled(self, lane: str, number: int, hidden: Iterator[Tensor]) -> Sink:
        sink = self.state.new_lane(lane, number, self.device)
        for x in hidden:
            sink.append(x)
        return sink


class _Nowhere(list[Tensor]):
    """Takes what is known already."""

    def append(self, x: Tensor, /) -> None:
        """Let go of it."""


def _put(model: nn.Module, name: str, block: nn.Module) -> None:
    """Exchange a block, in place, so that the order of modules stays."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, block)

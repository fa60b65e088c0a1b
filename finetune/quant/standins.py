"""Run what surrounds the blocks of a stack, and no block: how the blocks are called is seen without their weights.

Masks, positions and rotary tables come from the model itself, as they always do; a stand-in takes the place of each
block, notes its call, and hands on what it was given. That tells the truth only of a stack whose blocks are called the
same whatever they put out, each on what the one before it put out. Whether a stack is such a one is tried, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.quant.replay import Batch, Calls, Sink, split_call
from finetune.structure.experiments import UNFORESEEN

Answer = Callable[[Tensor], Any]
"""What a block returns, made of the hidden states in it."""
ANSWERS: tuple[Answer, ...] = (lambda hidden: hidden, lambda hidden: (hidden,))
"""The forms that blocks answer in: the hidden states, or a tuple of them alone."""
Seen = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
"""`seen(number, hidden, positional, named)`: a block was called; returns the hidden states that it puts out."""


class _Enough(Exception):
    """The last block was called: what comes after it is not wanted."""


class _StandIn(nn.Module):
    """Takes the place of a block. What the model asks of it beside a call (an attention type) the block answers."""

    def __init__(self, block: nn.Module, number: int, seen: Seen, answer: Answer) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a child: it is no part of the model for now
        self.number, self.seen, self.answer = number, seen, answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(self.seen(self.number, *split_call(self.__dict__["block"], args, kwargs)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


@contextmanager
def _standing_in(model: nn.Module, blocks: Sequence[str], seen: Seen, answer: Answer) -> Iterator[None]:
    """Within it `seen` is asked in the place of the blocks."""
    places = [(model.get_submodule(parent), leaf) for parent, _, leaf in (name.rpartition(".") for name in blocks)]
    originals = [model.get_submodule(name) for name in blocks]
    try:
        for number, ((parent, leaf), block) in enumerate(zip(places, originals, strict=True)):
            setattr(parent, leaf, _StandIn(block, number, seen, answer))
        yield
    finally:
        for (parent, leaf), block in zip(places, originals, strict=True):
            setattr(parent, leaf, block)


@torch.no_grad()
def answer_of(model: nn.Module, blocks: Sequence[str], batch: Batch) -> Answer | None:
    """In which form the blocks of a stack answer; None for a stack that cannot be run without them.

    Such a stack calls a block on something else than what the block before it put out (an encoder's neighbour, a
    shortcut), or with arguments that depend on what blocks put out.

    Args:
        model: whatever surrounds its blocks is in memory, the blocks need not be.
        batch: some input; its first row is used.
    """
    row = {key: value[:1] if isinstance(value, Tensor) else value for key, value in batch.items()}
    for answer in ANSWERS:
        try:
            first, plain = _attempt(model, blocks, row, answer, 0.0)
            second, still = _attempt(model, blocks, row, answer, 1.0)
        except UNFORESEEN:
            continue
        if plain and still and _same(first, second):
            return answer
    return None


def _attempt(
    model: nn.Module, blocks: Sequence[str], row: Batch, answer: Answer, change: float
) -> tuple[list[Any], bool]:
    """The arguments that the blocks are called with, and whether each gets what the one before it put out.

    Args:
        change: what a stand-in adds to its input.
    """
    calls: list[Any] = []
    last: list[Tensor] = []
    plain = [True]

    def seen(number: int, hidden: Tensor, positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        plain[0] &= number == len(calls) and (not last or hidden is last[-1] or torch.equal(hidden, last[-1]))
        calls.append((positional, named))
        last.append(hidden + change)
        return last[-1]

    with _standing_in(model, blocks, seen, answer):
        output = model(**row)
    given, positions = output[0].shape[:-1], last[-1].shape[:-1]  # a classifier gives one answer a row
    plain[0] &= len(calls) == len(blocks) and given in (positions, positions[:1])
    return calls, plain[0]


@torch.no_grad()
def rehearse(model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], answer: Answer, hidden: Sink) -> Calls:
    """As `replay.record`, without running a block, and without what comes after the last.

    Args:
        answer: what `answer_of` said.
        hidden: takes what goes into the first block, for each batch.
    """
    calls = Calls([[] for _ in blocks], hidden, [False] + [True] * (len(blocks) - 1))

    def seen(number: int, states: Tensor, positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        calls.arguments[number].append((positional, named))
        if number == 0:
            hidden.append(states)
        if number == len(blocks) - 1:
            raise _Enough
        return states

    with _standing_in(model, blocks, seen, answer):
        for batch in batches:
            try:
                model(**batch)
            except _Enough:
                continue
    return calls


@contextmanager
def ending(model: nn.Module, blocks: Sequence[str], answer: Answer) -> Iterator[Callable[[Tensor], None]]:
    """Within it the model makes predictions of hidden states that it is given, as if the last block had put them out.

    Yields:
        What is told these hidden states, before each call of the model.
    """
    given: list[Tensor] = []

    def seen(number: int, states: Tensor, _positional: Any, _named: Any) -> Tensor:
        return given.pop() if number == len(blocks) - 1 else states

    with _standing_in(model, blocks, seen, answer):
        yield given.append


def _same(one: Any, other: Any) -> bool:
    """Whether two trees of arguments are the same."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return (
            isinstance(other, tuple | list)
            and len(one) == len(other)
            and all(_same(a, b) for a, b in zip(one, other, strict=True))
        )
    return type(one) is type(other) and (one is other or (isinstance(one, bool | int | float | str) and one == other))

"""Where a model attends and where it takes in positions, found by an experiment: for what stands before the text.

A twin of the model without weights (on the meta device) runs once over a few tokens. Its attention goes through a
function of ours under a name of transformers' attention interface, so a module that attends is one that calls it. A
module takes in positions if it has no parts and is handed whole numbers that were computed from the positions the
model was given. No table of families and no names: a model whose attention does not come by, or whose positions
cannot be followed, is reported as such.
"""

from __future__ import annotations

import inspect as signatures
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.structure.base import Stack
from finetune.structure.experiments import UNFORESEEN, twin_of
from finetune.structure.inspect import inspect

NAME = "finetune_watched"
"""Of our function in transformers' attention interface."""
READ, WRITTEN = 5, 3
"""Tokens of the experiment: of the text, and of what a decoder writes beside it; they differ, so that attention over
another stack shows."""


@dataclass(frozen=True)
class SelfAttention:
    """A module that attends over its own sequence through the attention interface.

    Attributes:
        name: dotted name of the module.
        block: index of its block in the stack.
        heads: of keys and values, before they are repeated for groups of queries.
        key_width, value_width: features of a head.
        queries: heads of queries.
    """

    name: str
    block: int
    heads: int
    key_width: int
    value_width: int
    queries: int


@dataclass(frozen=True)
class PositionInput:
    """Where a module without parts takes in positions.

    Attributes:
        name: dotted name of the module.
        argument: place or name of the argument of its forward that holds them.
    """

    name: str
    argument: int | str


@dataclass(frozen=True)
class Attending:
    """How the last stack of a model attends.

    Attributes:
        modules: in the order of their blocks.
        others: dotted names of what else calls the attention interface: other stacks, attention over another stack.
        positions: empty where none were found.
    """

    modules: tuple[SelfAttention, ...]
    others: tuple[str, ...]
    positions: tuple[PositionInput, ...]


class _Positions(Tensor):
    """Whole numbers that remember that they are positions, or were computed from some."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        followed = bool(args) and isinstance(args[0], cls)  # what is looked up with positions is none
        return result if followed or not isinstance(result, cls) else result.as_subclass(Tensor)


_called: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []


def _watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """An attention function: notes the call, and gives something of the right shape."""
    _called.append((module, query, key, value))
    batch, heads, length, _width = query.shape
    return query.new_zeros(batch, length, heads, value.shape[-1]), None


def attending(model: nn.Module) -> Attending | None:
    """How a model of transformers attends, or None where its attention does not come by the attention interface.

    Neither the model nor its weights are touched. Not for several threads.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _watched)
    _called.clear()
    try:
        twin = twin_of(model, attention=NAME)
        with _position_inputs(twin) as positions:
            _run(twin)
        calls = list(_called)
    except UNFORESEEN:
        return None
    finally:
        _called.clear()
    names = {id(module): name for name, module in twin.named_modules()}
    stack = inspect(twin).stacks[-1]
    own = [_described(names[id(m)], stack, q, k, v) for m, q, k, v in calls if _is_own(names[id(m)], stack, q, k)]
    if not own:
        return None
    mine = {module.name for module in own}
    others = dict.fromkeys(names[id(m)] for m, *_ in calls if names[id(m)] not in mine)
    return Attending(tuple(sorted(own, key=lambda m: m.block)), tuple(others), tuple(dict.fromkeys(positions)))


def _run(twin: nn.Module) -> None:
    """One pass over a few tokens at given positions, where the model takes any."""
    accepted = signatures.signature(type(twin).forward).parameters
    with torch.device("meta"):
        inputs: dict[str, Any] = {"input_ids": torch.zeros(1, READ, dtype=torch.long)}
        # Without a mask some models look whether there is padding, which meta tensors refuse.
        inputs["attention_mask"] = torch.zeros(1, 1, READ, READ)
        if "decoder_input_ids" in accepted:
            inputs["decoder_input_ids"] = torch.zeros(1, WRITTEN, dtype=torch.long)
        if "position_ids" in accepted:
            inputs["position_ids"] = torch.zeros(1, READ, dtype=torch.long).as_subclass(_Positions)
        with torch.no_grad():
            twin(**inputs, use_cache=False)


@contextmanager
def _position_inputs(twin: nn.Module) -> Iterator[list[PositionInput]]:
    """Within it, collects where positions are taken in."""
    found: list[PositionInput] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            for argument, value in given.items():
                if isinstance(value, _Positions) and not value.is_floating_point() and value.dtype != torch.bool:
                    found.append(PositionInput(name, argument))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in twin.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_own(name: str, stack: Stack, query: Tensor, key: Tensor) -> bool:
    """Whether a call was one of self-attention in the blocks of a stack."""
    return query.shape[2] == key.shape[2] and any(name.startswith(f"{block}.") for block in stack.blocks)


def _described(name: str, stack: Stack, query: Tensor, key: Tensor, value: Tensor) -> SelfAttention:
    block = next(index for index, block in enumerate(stack.blocks) if name.startswith(f"{block}."))
    return SelfAttention(name, block, key.shape[1], key.shape[3], value.shape[3], query.shape[1])

"""How a model calls its blocks, recorded once, so that one block can be run alone; and what the projections of it read.

Nothing is known of families. The calls are seen by hooks while the whole model runs: every argument beside the hidden
states (masks, positions, rotary tables, what an encoder gave) is kept as it was handed over. Which hidden states go
from block to block is compared, not assumed.

Shape suffixes: I in features.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from finetune.quant.dense import DenseExperts
from finetune.structure.base import Projection

Batch = Mapping[str, Any]
"""Keyword arguments of the model; no row of it is padded."""
Saw = Callable[[str, int, Tensor], None]
"""`saw(projection, expert, x)`: what a projection, or one expert of it, multiplied just now."""
PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
"""How experts multiply: the input from the left, the weight of one expert from the right."""


class Enough(Exception):
    """Raised by who is told what projections read: the rest of this run of a block is not wanted."""


class Sink(Protocol):
    """Takes hidden states batch by batch and gives them back in that order, as often as asked; a list is one."""

    def append(self, x: Tensor, /) -> None: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __len__(self) -> int: ...


@dataclass
class Calls:
    """How a stack calls its blocks.

    Attributes:
        arguments: for each block, for each batch: positional and keyword arguments without the hidden states.
        hidden: for each batch, what goes into the block whose turn it is, at first the first one.
        chained: for each block, whether what goes into it is what the block before put out.
    """

    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    hidden: Sink = field(default_factory=list[Tensor])
    chained: list[bool] = field(default_factory=list)

    def forward(self, number: int, block: nn.Module) -> Callable[[], Iterator[Tensor]]:
        """What runs a block on the hidden states at hand, as the model calls it, one batch a step."""
        hidden, arguments = self.hidden, self.arguments[number]
        return lambda: (run(block, x, call) for x, call in zip(hidden, arguments, strict=True))

    def run(self, number: int, block: nn.Module) -> Iterator[Tensor]:
        """Run a block, or what takes its place, once over the hidden states at hand."""
        return self.forward(number, block)()


@torch.no_grad()
def record(model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch]) -> Calls:
    """Run the model over all batches and note how it calls the given blocks, the first one's input included."""
    calls = Calls([[] for _ in blocks], [], [False] + [True] * (len(blocks) - 1))
    last: list[Tensor | None] = [None]

    def before(number: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = split_call(block, args, kwargs)
            calls.arguments[number].append((rest, named))
            if number == 0:
                calls.hidden.append(hidden)
            elif last[0] is None or not (last[0] is hidden or torch.equal(last[0], hidden)):
                calls.chained[number] = False

        return hook

    def after(_block: nn.Module, _args: Any, output: Any) -> None:
        last[0] = hidden_of(output)

    modules = [model.get_submodule(name) for name in blocks]
    handles = [m.register_forward_pre_hook(before(i), with_kwargs=True) for i, m in enumerate(modules)]
    handles += [m.register_forward_hook(after) for m in modules]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def inputs_of(model: nn.Module, block: str, batches: Sequence[Batch]) -> Sink:
    """The hidden states that go into a block, for each batch, from a run of the whole model as it is now."""
    return record(model, [block], batches).hidden


def run(block: nn.Module, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """What a block makes of hidden states, called as the model calls it; the hidden states where it was enough."""
    rest, named = call
    try:
        if "" in named:  # handed over by name
            name = named[""]
            return hidden_of(block(*rest, **{k: v for k, v in named.items() if k}, **{name: hidden}))
        return hidden_of(block(hidden, *rest, **named))
    except Enough:
        return hidden


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    return output[0] if isinstance(output, tuple | list) else output


def split_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """The hidden states of a call, and the other arguments; under "" the name that the hidden states had, if any."""
    if args:
        return args[0], args[1:], dict(kwargs)
    name = next(iter(inspect.signature(block.forward).parameters))
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name} | {"": name}


class _ExpertProducts(TorchFunctionMode):
    """Sees the weight of one expert being cut out of a dense stack, and what it is multiplied with."""

    def __init__(self, stacks: Mapping[int, str], saw: Saw) -> None:
        super().__init__()
        self.stacks, self.saw = stacks, saw
        self._slices: dict[int, tuple[Tensor, str, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and id(args[0]) in self.stacks:
            self._slices[id(result)] = (result, self.stacks[id(args[0])], int(args[1]))
        elif func in PRODUCTS and len(args) > 1 and id(args[1]) in self._slices:
            _, name, expert = self._slices.pop(id(args[1]))
            self.saw(name, expert, args[0])
        return result


@contextmanager
def watching(model: nn.Module, projections: Sequence[Projection], saw: Saw) -> Iterator[None]:
    """Within it, `saw` is told what each of the given projections reads whenever it is used.

    Args:
        model: whose projections are dense frozen modules.
    """

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, args: saw(name, 0, args[0])

    stacks: dict[int, str] = {}
    handles = []
    for p in projections:
        module = model.get_submodule(p.name)
        if isinstance(module, DenseExperts):
            stacks[id(module.weight)] = p.name
        else:
            handles.append(module.register_forward_pre_hook(watch(p.name)))
    try:
        if stacks:
            with _ExpertProducts(stacks, saw):
                yield
        else:
            yield
    finally:
        for handle in handles:
            handle.remove()


class Readers(NamedTuple):
    """Projections that read one and the same tensor.

    Attributes:
        names: of them.
        once: whether a run of the block uses each of them once.
    """

    names: list[str]
    once: bool


def reading_alike(model: nn.Module, projections: Sequence[Projection], go: Callable[[], object]) -> list[Readers]:
    """Which projections read one and the same tensor, in the order in which these are first read.

    GPTQ calls this true-sequential: queries, keys and values, then what reads the attention's output, and so on. The
    projections of experts read rows of their own, so each stack is alone. Those that were not used are in no group.

    Args:
        go: runs the block once.
    """
    held: list[Tensor] = []  # keeps memory from being used twice, by which two tensors would look like one
    groups: dict[Any, list[str]] = {}
    times: Counter[str] = Counter()
    stacked = {p.name for p in projections if p.kind == "experts"}

    def saw(name: str, _expert: int, x: Tensor) -> None:
        held.append(x)
        times[name] += 1
        key = name if name in stacked else (x.data_ptr(), tuple(x.shape), x.stride())
        members = groups.setdefault(key, [])
        if not any(name in group for group in groups.values()):
            members.append(name)

    with watching(model, projections, saw):
        go()
    return [Readers(names, all(times[name] == 1 for name in names)) for names in groups.values() if names]

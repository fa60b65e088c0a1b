"""What each projection of a block is for, found by following the activations through the model.

A twin of the model without weights (on the meta device) runs once over a few tokens. Every projection's output, and the
embeddings', begins anew in the autograd graph, so that what a tensor was computed from is what its graph ends in:

- What is multiplied *from the right* in a product of two activations is a key or a value: attention is the only such
  product in a transformer (scores = q k^T, then weights v), whatever the projections are called, fused or not.
- A projection that does not read the residual stream (which everywhere contains the embeddings) ends a branch:
  an attention output where it reads keys or values, else a feed-forward output.

No table of families and no names. A model that this does not understand (no attention of this kind, a forward that
cannot run without values) is reported as such. For (IA)^3 and bottleneck adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from finetune.structure.base import Structure
from finetune.structure.experiments import UNFORESEEN, twin_of
from finetune.structure.inspect import inspect

STREAM = "the residual stream"
TOKENS = 4
PRODUCTS: dict[Callable[..., Any], tuple[tuple[int, str], tuple[int, str]]] = {
    torch.matmul: ((0, "input"), (1, "other")),
    Tensor.matmul: ((0, "self"), (1, "other")),
    Tensor.__matmul__: ((0, "self"), (1, "other")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    Tensor.bmm: ((0, "self"), (1, "mat2")),
    torch.baddbmm: ((1, "batch1"), (2, "batch2")),
    Tensor.baddbmm: ((1, "batch1"), (2, "batch2")),
    torch.einsum: ((1, "operands"), (2, "operands")),
}
"""Products of two activations, with the places and names of their left and right sides."""


@dataclass(frozen=True)
class Flow:
    """Names of projections by what they are for, in module order; a projection with no part in it is in none.

    Attributes:
        key_value: compute keys or values; where query, key and value are one projection, that one.
        attention_output: the last projection of attention, before the residual.
        feedforward_output: the last projection of a feed-forward, before the residual; its input is the intermediate
            activation. Stacked experts count where one of their two projections widens from the hidden size.
        feedforward_input: by the name of such an output, the projections that its branch begins with; none for experts.
        query, key, value: what computes the left side of scores, their right side, and what the weights are multiplied
            with. One projection may be all three.
        overwritten: whose outputs the model writes into (`y += residual`).
    """

    key_value: tuple[str, ...]
    attention_output: tuple[str, ...]
    feedforward_output: tuple[str, ...]
    feedforward_input: dict[str, tuple[str, ...]] = field(default_factory=dict)
    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()


def trace(model: nn.Module) -> Flow | None:
    """The flow of a transformers causal language model, or None where it is not understood.

    Neither the model nor its weights are touched: a twin of its class and configuration is built on the meta device.
    """
    twin = twin_of(model)
    structure = inspect(twin)
    # Models that make their own mask look into it, which meta tensors refuse; others take no other form.
    marks = _run(twin, structure, (1, 1, TOKENS, TOKENS)) or _run(twin, structure, (1, TOKENS)) or _run(twin, structure)
    if marks is None:
        return None
    inner = [name for name, sources in marks.read.items() if sources and STREAM not in sources]
    attention = [name for name in inner if marks.read[name] & marks.right and name not in marks.right]
    operands = {source for name in attention for source in marks.read[name]} | marks.right
    feedforward = [name for name in inner if name not in (*attention, *operands)]
    feedforward += _expert_outputs(structure)
    if not (marks.right and attention and feedforward):
        return None  # state space models multiply activations too, but have no feed-forward
    order = [p.name for p in structure.projections]
    right, attention, feedforward = (sorted(names, key=order.index) for names in (marks.right, attention, feedforward))
    begins = {end: [name for name in order if name in marks.read.get(end, ())] for end in feedforward}
    beginnings = {end: tuple(n for n in names if STREAM in marks.read.get(n, ())) for end, names in begins.items()}
    further = (marks.query, marks.key, marks.value, marks.overwritten - {STREAM})
    sides = (tuple(sorted(names, key=order.index)) for names in further)
    return Flow(tuple(right), tuple(attention), tuple(feedforward), beginnings, *sides)


class _Marks(TorchFunctionMode):
    """Collects what projections read and what products multiply from the right.

    Attributes:
        read: for each projection, the names that its input was computed from.
        query, key, value: projections that feed products of two activations: scores from the left and from the right,
            and what is multiplied by something that scores are in from the right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, set[str]] = {}
        self.query: set[str] = set()
        self.key: set[str] = set()
        self.value: set[str] = set()
        self._starts: dict[int, tuple[Tensor, str]] = {}
        self._given: list[tuple[str, Tensor, int]] = []

    @property
    def overwritten(self) -> set[str]:
        """Projections whose outputs have been written into since they were handed out."""
        return {name for name, output, version in self._given if output._version != version}

    @property
    def right(self) -> set[str]:
        """Projections that feed the right side of a product of two activations."""
        return self.key | self.value

    def begin(self, output: Any, name: str) -> Any:
        """The output as a new beginning of the graph."""
        if isinstance(output, tuple):
            return (self.begin(output[0], name), *output[1:])
        start = output.detach().requires_grad_()
        self._starts[id(start)] = (start, name)
        # Views of a leaf that asks for a gradient cannot be written in place, so hand out something behind it.
        given = start * 1
        self._given.append((name, given, given._version))
        return given

    def sources(self, tensor: Any) -> set[str]:
        """Names that a tensor was computed from."""
        found: set[str] = set()
        seen: set[Any] = set()
        waiting = [tensor.grad_fn] if isinstance(tensor, Tensor) and tensor.grad_fn is not None else []
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            _, name = self._starts.get(id(getattr(node, "variable", None)), (None, None))
            found |= {name} if name else set()
            waiting += [after for after, _ in node.next_functions if after is not None]
        return found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (_argument(args, kwargs, *side) for side in enumerate(("query", "key", "value")))
            self._multiplied(query, key)
            self.value |= self.sources(value) - {STREAM}
        elif func in PRODUCTS:
            self._multiplied(*(_argument(args, kwargs, *side) for side in PRODUCTS[func]))
        return func(*args, **kwargs)

    def _multiplied(self, left: Any, right: Any) -> None:
        """Note a product of two activations: of weights and values where the left side has met a key, else scores."""
        met, found = self.sources(left), self.sources(right) - {STREAM}
        if not met or not found:  # a product with a parameter, or of positions
            return
        if met & self.key:
            self.value |= found
        else:
            self.query |= met - {STREAM}
            self.key |= found


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    """One argument of a call, by place or by name."""
    return args[place] if len(args) > place else kwargs.get(name)


@contextmanager
def _marks(twin: nn.Module, structure: Structure) -> Iterator[_Marks]:
    marks = _Marks()

    def before(name: str) -> Callable[..., None]:
        return lambda _module, args: marks.read.__setitem__(name, marks.sources(args[0]))

    def after(name: str) -> Callable[..., Any]:
        return lambda _module, _args, output: marks.begin(output, name)

    handles = []
    for p in structure.projections:
        if p.kind != "experts":
            module = twin.get_submodule(p.name)
            handles += [module.register_forward_pre_hook(before(p.name)), module.register_forward_hook(after(p.name))]
    for name in {name for name in (structure.embeddings, *(s.embeddings for s in structure.stacks)) if name}:
        handles.append(twin.get_submodule(name).register_forward_hook(after(STREAM)))
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _run(twin: nn.Module, structure: Structure, mask: tuple[int, ...] | None = None) -> _Marks | None:
    """One pass with an attention mask of the given shape; None where the model cannot run so."""
    try:
        with _marks(twin, structure) as marks, marks, torch.device("meta"):
            ids = torch.zeros(1, TOKENS, dtype=torch.long)
            tokens = {"input_ids": ids} | ({"decoder_input_ids": ids} if len(structure.stacks) > 1 else {})
            twin(**tokens, attention_mask=None if mask is None else torch.zeros(mask), use_cache=False)
    except UNFORESEEN:
        return None
    return marks


def _expert_outputs(structure: Structure) -> Iterator[str]:
    """Of each module of stacked experts, the projection whose input is what the others put out."""
    stacks: dict[str, list[Any]] = {}
    for p in structure.projections:
        if p.kind == "experts":
            stacks.setdefault(p.name.rpartition(".")[0], []).append(p)
    for members in stacks.values():
        hidden = {p.out_features for p in members} & {p.in_features for p in members}
        ends = [p for p in members if p.out_features in hidden]
        if len(members) > 1 and ends:
            yield ends[-1].name

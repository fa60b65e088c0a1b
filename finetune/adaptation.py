"""What of a model an adapter would train and why, as `finetune doctor` prints it; a model without weights is enough."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS, Adapter, AdapterConfig
from finetune.adapters.bottleneck import sites
from finetune.errors import UserError
from finetune.quant.base import QuantConfig
from finetune.structure import Projection, Structure, inspect
from finetune.structure.attention import attending
from finetune.structure.flow import Flow, trace
from finetune.structure.inspect import routers

ROLES = {
    frozenset({"query", "key", "value"}): "queries, keys and values",
    frozenset({"query"}): "query",
    frozenset({"key"}): "key",
    frozenset({"value"}): "value",
    frozenset({"key", "value"}): "keys and values",
    frozenset({"query", "key"}): "queries and keys",
}
ROUTER = "left alone: it chooses or weighs experts, and an error in it sends a token elsewhere"
NOT_UNDERSTOOD = (
    "what its projections are for is not understood: adapter=ia3 needs names in adapter.targets and"
    " adapter.feedforward, and bottlenecks have no place"
)


def describe(model: nn.Module, config: AdapterConfig, quant: QuantConfig) -> list[str]:
    """Stacks, head, the kinds of blocks with what each projection is for, and what the adapter makes of them.

    Args:
        model: of transformers, on the meta device, as its checkpoint's configuration makes it.
        config: of the adapter; a refusal becomes a line.
        quant: how the base is to be stored.
    """
    structure, flow = inspect(model), trace(model)
    elsewhere = (
        [*([_bottlenecks(structure, flow)] if flow else []), *_virtual(model, structure)] if structure.stacks else []
    )
    adapter, refusal = _attached(model, config, quant)
    trained = {} if adapter is None else {n: tuple(p.shape) for n, p in adapter.trainable().items()}
    lines = [*_ends(structure), *([] if flow else [NOT_UNDERSTOOD])]
    lines += _blocks(model, structure, roles(structure, flow), trained, config.name)
    lines += elsewhere
    if adapter is None:
        return [*lines, f"adapter={config.name} refuses: {refusal}"]
    return [*lines, *_summary(adapter, structure, trained)]


def roles(structure: Structure, flow: Flow | None) -> dict[str, str]:
    """What each projection is for, by name; those that the flow of activations does not tell are left out."""
    if flow is None:
        return {}
    parts = {"query": flow.query, "key": flow.key, "value": flow.value}
    found = {name: "attention output" for name in flow.attention_output}
    found |= {name: "feed-forward output" for name in flow.feedforward_output}
    ends = {name.rpartition(".")[0] for name in flow.feedforward_output}
    begins = {name for names in flow.feedforward_input.values() for name in names}
    begins |= {p.name for p in structure.projections if p.kind == "experts" and p.name.rpartition(".")[0] in ends}
    for p in structure.projections:
        of = frozenset(part for part, names in parts.items() if p.name in names)
        if of in ROLES:
            found[p.name] = ROLES[of]
        elif p.name in begins and p.name not in found:
            found[p.name] = "feed-forward input"
    return found


def _attached(model: nn.Module, config: AdapterConfig, quant: QuantConfig | None = None) -> tuple[Adapter | None, str]:
    """The adapter on a copy of the model, or why it refuses."""
    try:
        if quant is not None:
            config.check_base(quant)
        with torch.device("meta"):
            return attach(copy.deepcopy(model), config), ""
    except UserError as error:
        return None, " ".join(str(error).split())


def _ends(structure: Structure) -> Iterator[str]:
    """Where tokens go in and what comes out."""
    for stack in structure.stacks:
        sees = "each position sees what precedes it" if stack.causal else "each position sees all"
        sees += ", and all of the stack before" if stack.reads else ""
        yield f"takes tokens in: {stack.name or 'the model itself'} by {stack.embeddings}; {sees}"
    if structure.ties:
        together = ", ".join(structure.ties)
        yield f"one weight: {together}: adapter.train_also names all of them or none"
    if structure.head:
        yield f"head: {structure.head}: quant.head and adapter.targets leave it alone unless they name it"
    if structure.task_head:
        yield f"head made for the task: {', '.join(structure.task_head)}: trains beside every adapter"


def _blocks(
    model: nn.Module,
    structure: Structure,
    purposes: Mapping[str, str],
    trained: Mapping[str, tuple[int, ...]],
    method: str,
) -> Iterator[str]:
    """Each kind of block once, with its projections."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for number, block in enumerate(structure.blocks):
        rows = [_row(p, block, purposes, trained) for p in structure.projections if p.block == number]
        rows += [f"    {name.removeprefix(f'{block}.')}: {ROUTER}" for name in routers(model, block)]
        kinds.setdefault(tuple(rows), []).append(block)
    for kind, blocks in kinds.items():
        where = blocks[0] if len(blocks) == 1 else f"{len(blocks)} alike, {blocks[0]} to {blocks[-1]}"
        starred = f" (* adapter={method})" if any(row.startswith("  *") for row in kind) else ""
        yield f"blocks: {where}{starred}"
        yield from kind


def _row(p: Projection, block: str, purposes: Mapping[str, str], trained: Mapping[str, tuple[int, ...]]) -> str:
    """A projection: whether the adapter sits on it, its shape, what it is for, how it is stored where that is fixed."""
    star = "*" if any(name.startswith(f"{p.name}.") for name in trained) else " "
    stack = f" x {p.experts} experts" if p.experts > 1 else ""
    purpose = f", {purposes[p.name]}" if p.name in purposes else ""
    dense = "; stays in floating point, which the model's code wants" if p.dense else ""
    name = p.name.removeprefix(f"{block}.")
    return f"  {star} {name}: {p.kind} {p.in_features} -> {p.out_features}{stack}{purpose}{dense}"


def _bottlenecks(structure: Structure, flow: Flow) -> str:
    """Where sub-layers end."""
    plan, modules = sites(flow, structure, after_attention=True)
    places = dict.fromkeys(_within(name, structure) for name in (*(p.name for p in plan), *modules))
    return f"bottlenecks go after: {', '.join(places)} of every block that has them"


def _virtual(model: nn.Module, structure: Structure) -> Iterator[str]:
    """Where what stands before the text goes in."""
    first, last = (stack.name or "the model" for stack in (structure.stacks[0], structure.stacks[-1]))
    _, refusal = _attached(model, ADAPTERS.type_of("prompt_tuning")())
    yield f"no virtual tokens: {refusal}" if refusal else f"virtual tokens go in: before the tokens of {first}"
    _, refusal = _attached(model, ADAPTERS.type_of("prefix")())
    found = None if structure.stacks[-1].reads else attending(model)
    places = dict.fromkeys(_within(module.name, structure) for module in (found.modules if found else ()))
    where = f"{', '.join(places)} of every block of {last}" if places else f"the cache of {last}"
    yield f"no trained keys and values: {refusal}" if refusal else f"trained keys and values go in: {where}"


def _within(name: str, structure: Structure) -> str:
    """A name without that of its block."""
    block = next((block for block in structure.blocks if name.startswith(f"{block}.")), "")
    return name.removeprefix(f"{block}.") if block else name


def _summary(adapter: Adapter, structure: Structure, trained: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """How much trains, tensor by tensor (those of alike blocks in one line), and what becomes of it."""
    parameters = adapter.trainable()
    count = sum(p.numel() for p in parameters.values())
    own = {id(p) for p in parameters.values()}
    others = sum(p.numel() for p in adapter.model.parameters() if id(p) not in own)
    share = f"{count / max(others, 1):.2%}"
    yield f"adapter={adapter.config.name} trains {count:,} weights, {share} of the model's, in {len(trained)} tensors:"
    alike: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in trained.items():
        key = (_within(name, structure), shape)
        alike[key] = alike.get(key, 0) + 1
    for (name, shape), times in alike.items():
        yield f"    {name} {list(shape)}{f', {times} times' if times > 1 else ''}"
    if adapter.note:
        yield adapter.note
    if adapter.virtual_tokens:
        yield f"it takes up {adapter.virtual_tokens} positions of the context before every row"
    yield "it merges into plain weights" if adapter.mergeable else f"it does not merge: {adapter.obstacle}"

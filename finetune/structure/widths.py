"""The configuration of a model with narrower feed-forwards or fewer attention heads, found by experiment.

Families keep these sizes under different keys, some compute them from others, some fix them. No table of them here: an
entry is the right one when the model that is built with another value there has exactly the weights smaller that are
meant to be. An entry that is empty, or that a model asks its configuration for in vain (`getattr(config, "head_dim",
...)`), may be the right one too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import nn

from finetune.errors import ModelError
from finetune.structure.attention import attending
from finetune.structure.experiments import UNFORESEEN, attempt, with_settings
from finetune.structure.flow import Flow, trace
from finetune.structure.inspect import inspect

Build = Callable[[Any], nn.Module]
"""Makes the model of a configuration, on the meta device."""
Kept = Callable[[int], int]
"""How many of so many stay."""


@dataclass(frozen=True)
class Shrunk:
    """A parameter that is smaller in one model than in another.

    Attributes:
        axis: the one along which it is.
        before, after: its size there.
    """

    axis: int
    before: int
    after: int


@dataclass(frozen=True)
class Heads:
    """The attention heads of a model, the same in each block.

    Attributes:
        queries: heads of queries.
        groups: heads of keys and values; each serves so many heads of queries, one behind the other.
        key_width, value_width: features of a head.
    """

    queries: int
    groups: int
    key_width: int
    value_width: int


def shrunk(full: nn.Module, small: nn.Module, blocks: Collection[str]) -> dict[str, Shrunk] | None:
    """The parameters that are smaller, by name; None where models differ in anything else, or outside the blocks."""
    inside = tuple(f"{block}." for block in blocks)
    wanted, found = dict(full.named_parameters()), dict(small.named_parameters())
    if wanted.keys() != found.keys():
        return None
    result: dict[str, Shrunk] = {}
    for name, parameter in wanted.items():
        before, after = tuple(parameter.shape), tuple(found[name].shape)
        axes = [axis for axis, size in enumerate(before) if len(before) == len(after) and after[axis] != size]
        if before == after:
            continue
        if len(axes) != 1 or after[axes[0]] > before[axes[0]] or not name.startswith(inside):
            return None
        result[name] = Shrunk(axes[0], before[axes[0]], after[axes[0]])
    return result


def feedforward_outputs(model: nn.Module) -> tuple[str, ...]:
    """Names of the projections that read the channels of a feed-forward.

    Raises:
        ModelError: where the model is not understood.
    """
    return _flow(model).feedforward_output


def narrow_channels(model: nn.Module, kept: Kept, build: Build) -> Any:
    """The configuration of a model whose feed-forwards have fewer channels.

    Args:
        model: of transformers, on the meta device.
        kept: how many channels stay, of so many.

    Raises:
        ModelError: where no entries of the configuration say how wide the feed-forwards are.
    """
    structure, outputs = inspect(model), set(feedforward_outputs(model))
    left = {p.name: p.in_features for p in structure.projections if p.name in outputs}
    settings: dict[str, int] = {}
    for key, value in _width_entries(model, set(left.values()), kept):
        small = _built(model, {**settings, key: value}, build)
        changed = shrunk(model, small, structure.blocks) if small is not None else None
        narrowed = _narrowed(model, small) if changed else {}
        if not narrowed.keys() & left.keys() or not narrowed.keys() <= outputs:
            continue
        settings[key] = value
        left = {name: width for name, width in left.items() if name not in narrowed}
        if not left:
            return with_settings(model.config, settings)
    name, width = next(iter(left.items()))
    raise ModelError(
        f"{type(model).__name__} cannot lose channels: no entry of its configuration says that {name} reads {width}"
    )


def _width_entries(model: nn.Module, widths: set[int], kept: Kept) -> Iterator[tuple[str, int]]:
    """Entries that may hold a width, with what stays of it: those that equal one, divide one, or hold nothing."""
    entries = _entries(model)
    numbers = {key: value for key, value in entries.items() if type(value) is int and value > 1}
    equal = [key for key, value in numbers.items() if value in widths]
    parts = [key for key, value in numbers.items() if key not in equal and any(w % value == 0 for w in widths)]
    yield from ((key, kept(numbers[key])) for key in (*equal, *parts) if kept(numbers[key]) < numbers[key])
    empty = [key for key, value in entries.items() if value is None]
    yield from ((key, kept(width)) for key in empty for width in sorted(widths))


def heads_of(model: nn.Module) -> Heads:
    """The attention heads of a model.

    Raises:
        ModelError: where attention is not understood, or blocks differ in their heads.
    """
    found = attending(model)
    name = type(model).__name__
    if found is None:
        raise ModelError(f"{name} cannot lose heads: its attention does not come by transformers' attention interface")
    if found.others:
        raise ModelError(f"{name} cannot lose heads: {found.others[0]} attends beside its last stack's own attention")
    kinds = {Heads(m.queries, m.heads, m.key_width, m.value_width) for m in found.modules}
    if len(kinds) > 1:
        raise ModelError(f"{name} cannot lose heads: its blocks differ in them, and a configuration names one number")
    heads = kinds.pop()
    if heads.queries % heads.groups:
        raise ModelError(
            f"{name} cannot lose heads: {heads.groups} heads of keys do not divide {heads.queries} of queries"
        )
    return heads


def attention_outputs(model: nn.Module) -> tuple[str, ...]:
    """Names of the projections that read what the heads put out.

    Raises:
        ModelError: where the model is not understood.
    """
    return _flow(model).attention_output


def narrow_heads(model: nn.Module, heads: Heads, groups: int, build: Build) -> Any:
    """The configuration of a model that has so many heads of keys and values, and of queries in proportion.

    Raises:
        ModelError: where no entries of the configuration say how many there are, the width of a head being what it is.
    """
    flow, blocks = _flow(model), inspect(model).blocks
    wanted = {*flow.query, *flow.key, *flow.value}
    for settings in _head_settings(model, heads, groups, build):
        small = _built(model, settings, build)
        changed = shrunk(model, small, blocks) if small is not None else None
        if small is None or not changed or set(_narrowed(model, small)) != set(flow.attention_output):
            continue
        in_proportion = all(s.after * heads.groups == s.before * groups for s in changed.values())
        everywhere = wanted <= {name.rpartition(".")[0] for name in changed}
        if in_proportion and everywhere and _has(small, heads, groups):
            return with_settings(model.config, settings)
    raise ModelError(
        f"{type(model).__name__} cannot lose heads: no entries of its configuration give {groups} of its"
        f" {heads.groups} heads of keys and values with a width of {heads.key_width} each"
    )


def _has(small: nn.Module, heads: Heads, groups: int) -> bool:
    """Whether a model has so many groups of heads, as wide as they were: narrower heads would have the same shapes."""
    try:
        found = heads_of(small)
    except ModelError:
        return False
    return found == replace(heads, queries=heads.queries // heads.groups * groups, groups=groups)


def _head_settings(model: nn.Module, heads: Heads, groups: int, build: Build) -> Iterator[dict[str, int]]:
    """Changes of the configuration that may be the right one, the smallest first."""
    new = {heads.queries: heads.queries // heads.groups * groups, heads.groups: groups}
    entries = _entries(model)
    numbers = [key for key, value in entries.items() if type(value) is int and value in new]
    sets = [keys for size in (1, 2) for keys in combinations(numbers, size)]
    yield from ({key: new[entries[key]] for key in keys} for keys in sets)
    # Where the width of a head is computed from their number, an entry of its own may fix it.
    empty = [key for key, value in entries.items() if value is None]
    for pin in (*_asked_in_vain(model), *empty):
        if _built(model, {pin: 2 * heads.key_width}, build, changes=True) is not None:
            yield from ({key: new[entries[key]] for key in keys} | {pin: heads.key_width} for keys in sets)


def _asked_in_vain(model: nn.Module) -> tuple[str, ...]:
    """Entries that a model asks its configuration for, while it is built, though there are none."""
    asked: dict[str, None] = {}

    def missing(_config: Any, name: str) -> Any:
        asked[name] = None
        raise AttributeError(name)

    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    plain = type(text)
    text.__class__ = type(plain.__name__, (plain,), {"__getattr__": missing})
    try:
        with torch.device("meta"):
            type(model)(config)
    except UNFORESEEN:
        return ()
    return tuple(name for name in asked if not name.startswith("_"))


def _entries(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    return config.get_text_config().to_dict()


def _built(model: nn.Module, settings: Mapping[str, int], build: Build, *, changes: bool = False) -> nn.Module | None:
    """The model with these settings, or None where there is none.

    Args:
        changes: None also where it has the weights of the model as it is.
    """
    small = attempt(build, model.config, settings)  # type: ignore[arg-type]
    if small is None:
        return None
    same = changes and [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]
    return None if same else small


def _narrowed(model: nn.Module, small: nn.Module | None) -> dict[str, int]:
    """Projections that read fewer inputs than in the model as it is, with how many."""
    before = {p.name: p.in_features for p in inspect(model).projections}
    found = inspect(small).projections if small is not None else ()
    return {p.name: p.in_features for p in found if p.in_features != before.get(p.name)}


def _flow(model: nn.Module) -> Flow:
    with torch.enable_grad():  # by whose graph projections are followed
        flow = trace(model)
    if flow is None:
        raise ModelError(f"{type(model).__name__} cannot be cut: what its projections are for is not understood")
    return flow

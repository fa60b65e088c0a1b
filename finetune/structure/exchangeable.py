"""Modules between the projections that could be computed by fused operators, found by type, shape and attributes.

What is found here only looks right: whether a module computes what its structure suggests is tried on it by
model/exchange.py, and nothing is exchanged that did not agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.structure.base import Projection
from finetune.structure.inspect import projection_of


@dataclass(frozen=True)
class GatedLayers:
    """The projections of a gated MLP, by the names of children.

    Attributes:
        pair: two projections of one shape, gate and up in some order; or one of twice the width.
        down: what their product feeds.
    """

    pair: tuple[str, ...]
    down: str


@dataclass(frozen=True)
class RotaryLayers:
    """The parts of an attention module with rotary positions, by the names of children.

    Attributes:
        query, key, value, out: projections.
        query_norm, key_norm: of a head's features, between projection and rotation; None where there is none.
        head_dim: features of a head.
    """

    query: str
    key: str
    value: str
    out: str
    query_norm: str | None
    key_norm: str | None
    head_dim: int


def untouched(module: nn.Module) -> bool:
    """Whether a call of the module is its class's own forward: no hooks, no forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def norm_epsilons(module: nn.Module) -> list[float]:
    """Numbers that may be the epsilon of a norm over the last dimension; empty where it cannot be one.

    Such a module holds one vector called `weight`, nothing else, and a small positive number.
    """
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    weight = getattr(module, "weight", None)
    if names != {"weight"} or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return []
    if any(True for _ in module.children()) or not untouched(module):
        return []
    return [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2]


def gated_layers(module: nn.Module) -> GatedLayers | None:
    """The projections of a module that may be a gated MLP, or None.

    It has two projections of one shape, or one, that widen its input, one that brings it back, and nothing else with
    weights.
    """
    layers = _projections(module)
    if not untouched(module) or len(layers) not in (2, 3) or _has_more(module, layers):
        return None
    for down, last in layers.items():
        pair = {name: layer for name, layer in layers.items() if name != down}
        shapes = {(layer.in_features, layer.out_features) for layer in pair.values()}
        width = last.in_features * 2 // len(pair)
        if shapes == {(last.out_features, width)}:
            return GatedLayers(tuple(pair), down)
    return None


def rotary_layers(module: nn.Module) -> RotaryLayers | None:
    """The parts of a module that may be attention with rotary positions and projections of its own, or None.

    It knows its head's width and holds four projections: three from the hidden features, of which two (key and value)
    have one width, and one back to them, in that order; and no or two norms of a head's features.
    """
    layers = _projections(module)
    head_dim: Any = getattr(module, "head_dim", None)
    if not untouched(module) or len(layers) != 4 or not isinstance(head_dim, int):
        return None
    (query, q), (key, k), (value, v), (out, o) = layers.items()
    hidden = q.in_features
    if not (hidden == k.in_features == v.in_features == o.out_features and k.out_features == v.out_features):
        return None
    if q.out_features != o.in_features or any(layer.out_features % head_dim for layer in (q, k)):
        return None
    norms = [name for name, child in module.named_children() if norm_epsilons(child)]
    if len(norms) not in (0, 2) or _has_more(module, [*layers, *norms]):
        return None
    if any(module.get_submodule(name).weight.shape != (head_dim,) for name in norms):
        return None
    first, second = norms or (None, None)
    return RotaryLayers(query, key, value, out, first, second, head_dim)


def _projections(module: nn.Module) -> dict[str, Projection]:
    """The children that are projections."""
    found = {name: projection_of(child, name) for name, child in module.named_children()}
    return {name: projection for name, projection in found.items() if projection is not None}


def _has_more(module: nn.Module, known: Any) -> bool:
    """Whether a module holds weights or buffers outside some of its children, or dropout."""
    own = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
    others = [child for name, child in module.named_children() if name not in known]
    dropout = any(isinstance(child, nn.Dropout) and child.p > 0 for child in others)
    return own or dropout or any(True for child in others for _ in (*child.parameters(), *child.buffers()))

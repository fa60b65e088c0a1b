"""A block with fewer channels or heads: which rows and columns of its parameters are the ones that stay.

A *unit* is what goes or stays as a whole: a channel of a feed-forward, or a head of keys and values with the heads of
queries that it serves. The projection that reads the units (the *reader*) has the columns of each side by side. Which
rows of a fused projection make a unit is a matter of layout: gate and up, or query, key and value, lie in turn for each
unit, or all units of the one before all of the other. A layout is a hypothesis here; narrow.py tries it on the block.

Shape suffixes: E experts, U units, K units that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn

from finetune.structure.base import Projection
from finetune.structure.widths import Shrunk

Layout = tuple[int, ...]
"""Rows of a unit in each of the segments that a parameter consists of, one behind the other, units in order in each."""
MOST = 64
"""Combinations of layouts that are tried."""


@dataclass(frozen=True)
class Part:
    """A parameter of a block that has fewer rows or columns than it had.

    Attributes:
        shrunk: along which axis, and how much.
        reader: name of the projection whose units it has.
        layout: of its rows.
        apart: whether each expert has units of its own, along the first axis.
    """

    shrunk: Shrunk
    reader: str
    layout: Layout
    apart: bool

    def index(self, kept_EK: Tensor) -> Tensor:
        """Places along the axis that stay, [E, ..]."""
        units = self.shrunk.before // sum(self.layout)
        start, places = 0, []
        for rows in self.layout:
            inside = start + kept_EK.unsqueeze(-1) * rows + torch.arange(rows, device=kept_EK.device)
            places.append(inside.flatten(1))
            start += units * rows
        return torch.cat(places, dim=1)

    def cut(self, tensor: Tensor, kept_EK: Tensor) -> Tensor:
        """What is left of the parameter."""
        index = self.index(kept_EK.to(tensor.device))
        if not self.apart:
            return tensor.index_select(self.shrunk.axis, index[0])
        return torch.stack([t.index_select(self.shrunk.axis - 1, i) for t, i in zip(tensor, index, strict=True)])

    def energies(self, tensor: Tensor) -> Tensor:
        """Sum of squares of each unit's weights, [E, U]."""
        square = tensor.float().square().movedim(self.shrunk.axis, -1)
        sums = square.reshape(len(tensor) if self.apart else 1, -1, self.shrunk.before).sum(1)
        units = self.shrunk.before // sum(self.layout)
        segments = sums.split([units * rows for rows in self.layout], dim=1)
        by_unit = [s.unflatten(1, (units, rows)).sum(-1) for s, rows in zip(segments, self.layout, strict=True)]
        return torch.stack(by_unit).sum(0)


def assignments(
    shapes: Mapping[str, Shrunk],
    readers: Sequence[Projection],
    units: Mapping[str, int],
    fused: Sequence[Layout],
) -> list[dict[str, Part]]:
    """Ways to read the parameters of a block, by their name in the model, the plainest first.

    Args:
        shapes: the parameters that shrink.
        readers: of the block.
        units: how many each reader has.
        fused: layouts that a fused projection may have beside those of equal segments, in rows of a unit.
    """
    keys, options = [], []
    by_module: dict[str, list[str]] = {}
    for name in shapes:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for names in by_module.values():  # weight and bias are laid out alike
        reader = max(readers, key=lambda r: _shared(r.name, names[0]))
        rows, rest = divmod(shapes[names[0]].before, units[reader.name])
        if rest or any(shapes[name].before != shapes[names[0]].before for name in names):
            return []
        width = reader.in_features // units[reader.name]
        layouts: list[Layout] = [(rows,)]
        if rows > width:
            layouts += [(rows // n,) * n for n in (2, 3) if rows % n == 0]
            layouts += [layout for layout in fused if sum(layout) == rows]
        keys.append((names, reader))
        options.append(list(dict.fromkeys(layouts)))
    return [
        {
            name: Part(shapes[name], reader.name, layout, reader.kind == "experts")
            for (names, reader), layout in zip(keys, chosen, strict=True)
            for name in names
        }
        for chosen in islice(product(*options), MOST)
    ]


def _shared(one: str, other: str) -> int:
    """How many parts two dotted names begin with in common."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))


def filled(
    empty: nn.Module, block: nn.Module, name: str, parts: Mapping[str, Part], kept: Mapping[str, Tensor]
) -> nn.Module:
    """A block of the small model with what is left of the weights of a large one; what stays whole is shared.

    Args:
        empty: on the meta device; its projections dense frozen modules, as those of `block`.
        name: of the block in the model.
        parts: by the names of parameters in the model.
        kept: by the names of readers, units that stay, [E, K], in order.

    Raises:
        ValueError: where the small block wants something that the large one does not have.
    """
    small = copy.deepcopy(empty)
    ours, given = dict(block.named_parameters()), dict(block.named_buffers())
    for path, parameter in list(small.named_parameters()):
        part = parts.get(f"{name}.{path}")
        held = ours[path].detach()
        value = held if part is None else part.cut(held, kept[part.reader])
        if value.shape != parameter.shape:
            raise ValueError(f"{path} has shape {list(value.shape)}, expected {list(parameter.shape)}")
        _owner(small, path)._parameters[path.rpartition(".")[2]] = nn.Parameter(value, requires_grad=False)
    for path, buffer in list(small.named_buffers()):
        if path not in given or given[path].shape != buffer.shape:
            raise ValueError(f"{path} depends on sizes that change")
        _owner(small, path)._buffers[path.rpartition(".")[2]] = given[path]
    return small.eval()


def _owner(module: nn.Module, path: str) -> Any:
    return module.get_submodule(path.rpartition(".")[0])

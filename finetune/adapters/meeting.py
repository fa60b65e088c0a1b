"""Where the parts of a stack meet in a model: which of them may, and the head that they all train."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finetune.adapters.base import Adapter
from finetune.adapters.full_copy import FullCopy
from finetune.adapters.mounting import Mounted
from finetune.errors import ConfigError


def check_parts(parts: Mapping[str, Adapter], task_head: Sequence[str] = ()) -> None:
    """Refuse parts that cannot stand in one model.

    Args:
        parts: in order, each over those before it.
        task_head: modules that train beside every adapter, which all parts share.

    Raises:
        ConfigError: for the first two that meet where they cannot, naming both and the place.
    """
    for (first, below), (second, above) in itertools.combinations(parts.items(), 2):
        inner, outer = below.places(), above.places()
        for place in sorted(outer.keys() & inner.keys() - {*task_head}):
            if not _over(outer[place], inner[place]):
                turned = f", or put {second} before {first}" if _over(inner[place], outer[place]) else ""
                raise ConfigError(
                    f"adapter=stack: {second} cannot stand over {first} at {place}: leave it out of one of them{turned}"
                )
        for whole, other in ((inner, outer), (outer, inner)):
            copied = tuple(f"{place}." for place, module in whole.items() if isinstance(module, FullCopy))
            inside = next((place for place in other if copied and place.startswith(copied)), None)
            if inside is not None:
                raise ConfigError(
                    f"adapter=stack: {first} and {second} meet at {inside}, inside of what one of them trains whole:"
                    f" leave it out of one of them"
                )


def _over(above: Mounted, below: Mounted) -> bool:
    """Whether one adapter's module may stand over another's."""
    return above.over and below.under


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same values; those without any are taken to."""
    if first.is_meta or second.is_meta:
        return True
    return torch.equal(first.detach().cpu().float(), second.detach().cpu().float())


def share_heads(parts: Mapping[str, Adapter], task_head: Sequence[str]) -> None:
    """Let all parts train the first one's head for the task.

    Raises:
        ConfigError: where they have learnt different ones.
    """
    for name in task_head:
        owners = [(label, part) for label, part in parts.items() if name in part.copies]
        for label, part in owners[1:]:
            first, head = owners[0][0], owners[0][1].copies[name]
            mine = dict(part.copies[name].trains())
            if not all(_equal(tensor, mine[leaf]) for leaf, tensor in head.trains()):
                raise ConfigError(
                    f"adapter=stack: {first} and {label} have learnt different heads {name}: use one of them at a time"
                )
        for _, part in owners[1:]:
            part.take_over(name, owners[0][1].copies[name])

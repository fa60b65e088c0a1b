"""The configuration of a model with some of its blocks left out, found by experiment.

Families keep their number of blocks under different keys, and some keep a list with an entry for each block (kinds of
attention, windows). No table of them here: a key is the right one when it equals the number of blocks and the model
that is built with another value there has that many, each of the shape of the block that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from finetune.errors import ModelError
from finetune.structure.experiments import attempt, with_settings
from finetune.structure.inspect import inspect


def cut_config(model: nn.Module, kept: Sequence[int], build: Callable[[Any], nn.Module]) -> Any:
    """The configuration of a model that has some of the blocks of another, in the same order.

    Args:
        model: of transformers, on the meta device or not.
        kept: numbers of its blocks.
        build: makes the model of a configuration, on the meta device.

    Raises:
        ModelError: where no entry of the configuration says how many blocks there are, or such a model's blocks have
            other weights.
    """
    blocks = inspect(model).blocks
    if len(kept) == len(blocks):
        return with_settings(model.config, {})
    wanted = _shapes(model, [blocks[number] for number in kept])
    for settings in _candidates(model.config, len(blocks), kept):
        found = attempt(build, model.config, settings)
        if found is not None and _shapes(found, inspect(found).blocks) == wanted:
            return with_settings(model.config, settings)
    raise ModelError(
        f"{type(model).__name__} cannot be cut: no entry of its configuration gives {len(kept)} of its {len(blocks)}"
        " blocks with the weights that they have"
    )


def _candidates(config: Any, count: int, kept: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Changes of the configuration: each entry that equals the number of blocks, lists by block cut along."""
    entries = config.get_text_config().to_dict()
    numbers = [key for key, value in entries.items() if type(value) is int and value == count]
    lists = {
        key: [value[number] for number in kept]
        for key, value in entries.items()
        if isinstance(value, list) and len(value) == count and not key.endswith("token_id")
    }
    for number in numbers:
        yield {**lists, number: len(kept)}
        yield {number: len(kept)}


def _shapes(model: nn.Module, blocks: Sequence[str]) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the projections and other parameters of some blocks, by their name inside the block."""
    structure = inspect(model)
    found = []
    for block in blocks:
        projections = [p for p in structure.projections if p.name.startswith(f"{block}.")]
        held: dict[str, tuple[int, ...]] = {p.name: (p.experts, p.in_features, p.out_features) for p in projections}
        inside = tuple(held)
        for name, parameter in model.get_submodule(block).named_parameters(prefix=block):
            if not name.startswith(inside):
                held[name] = tuple(parameter.shape)
        found.append({name.removeprefix(f"{block}."): shape for name, shape in held.items()})
    return found

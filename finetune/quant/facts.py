"""What the state of a frozen module says of itself: settings as JSON in a uint8 tensor, and tensors that have to fit.

Such a tensor is what bitsandbytes' `pack_dict_to_tensor` writes. The JSON of our own formats holds `format_version`,
`dtype` (of the weight it stands for), `shape` (as its codes run) and what a format adds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""dtypes that a weight may stand for, or its scales come in, by their names."""
COMMON = ("format_version", "dtype", "shape")
"""What the JSON of every format of ours holds."""


def pack_json(facts: dict[str, Any]) -> Tensor:
    """A dictionary as UTF-8 JSON in a uint8 tensor."""
    return torch.tensor(list(json.dumps(facts).encode("utf-8")), dtype=torch.uint8)


def unpack_json(packed: Tensor) -> Any:
    """The inverse of `pack_json`."""
    return json.loads(bytes(packed.cpu().contiguous().numpy()).decode("utf-8"))


def facts_in(packed: Tensor, needed: Iterable[str], where: str) -> dict[str, Any]:
    """The dictionary in a tensor of `pack_json`.

    Args:
        needed: keys that it has to hold.
        where: the tensor's name.

    Raises:
        ModelError: naming the tensor, where it holds no JSON or a key is missing.
    """
    try:
        facts = unpack_json(packed)
    except ValueError as error:
        raise ModelError(f"{where} is not JSON: {error}") from error
    if not isinstance(facts, dict) or not facts.keys() >= set(needed):
        raise ModelError(f"{where} does not hold {', '.join(needed)}: {facts}")
    return facts


def facts_of(
    state: dict[str, Tensor], name: str, key: str, version: int, needed: Iterable[str], what: str = "codes"
) -> dict[str, Any]:
    """The settings that a module of a format of ours left in a checkpoint; their values are the format's to check.

    Args:
        state: the tensors by their keys, relative to the module.
        name: prefix of these keys, for messages.
        key: of the settings.
        version: of the format, that this program reads.
        needed: what they hold beside `COMMON`.
        what: a weight holds, in a word.

    Raises:
        ModelError: naming the key and what is wrong with it.
    """
    where = name + key
    if "weight" not in state or key not in state:
        raise ModelError(f"{name}weight: expected {what} and {key}, the checkpoint has {sorted(state)}")
    facts = facts_in(state[key], [*COMMON, *needed], where)
    if facts["format_version"] != version:
        raise ModelError(f"{where} has format_version {facts['format_version']}, this program reads {version}")
    if facts["dtype"] not in FLOATS:
        raise ModelError(f"{where} is not a storage we can read: {facts}")
    return facts


def checked(state: dict[str, Tensor], name: str, key: str, shape: tuple[int, ...], *kinds: torch.dtype) -> Tensor:
    """A tensor of a state.

    Args:
        name: prefix of the key, for messages.
        kinds: dtypes that it may have.

    Raises:
        ModelError: naming the key, where it is missing or of another shape or dtype.
    """
    if key not in state:
        raise ModelError(f"{name}{key} is missing from the checkpoint")
    value = state[key].detach()
    if tuple(value.shape) != shape or value.dtype not in kinds:
        found, wanted = f"{list(value.shape)} {value.dtype}", f"{list(shape)} {kinds[0]}"
        raise ModelError(f"{name}{key} is {found}, expected {wanted}")
    return value


def reader(state: dict[str, Tensor], name: str, mine: Tensor) -> Callable[..., Tensor]:
    """`checked(state, name, ...)` onto the device of `mine`, or the state's where that is on meta."""
    device = state["weight"].device if mine.is_meta and "weight" in state else mine.device
    return lambda key, shape, *kinds: checked(state, name, key, shape, *kinds).to(device)


def same_shape(told: Any, shape: tuple[int, ...], name: str) -> None:
    """Refuse settings of a weight of another shape.

    Args:
        told: the shape that they say.
        name: prefix of the weight, for messages.

    Raises:
        ModelError: naming both.
    """
    if told != list(shape):
        raise ModelError(f"{name}weight: the checkpoint has shape {told}, expected {list(shape)}")

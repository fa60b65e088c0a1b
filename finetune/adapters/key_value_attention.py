"""Trained keys and values before those of the text, by way of transformers' attention interface.

While it is carried, the model's attention goes by a name of ours: a function that sets the trained keys and values
before the given ones, widens the mask by columns that everyone sees, and calls the implementation that was there. The
mask is made by that implementation's own function, so the model notices nothing, a cache holds real tokens alone, and
packing, checkpointing, beams and padding are what they were. Where modules take in positions, those are moved.

Shape suffixes: B rows, H heads of keys and values, L trained positions, S queries, T keys, D features of a head.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor, nn

from finetune.adapters.input import Removable
from finetune.structure.attention import Attending, PositionInput

NAME = "finetune_key_value"
EAGER = "eager"
"""What transformers calls the attention that every modelling file writes out for itself."""


class KeyValues(Protocol):
    """What trains, as a carrier meets it."""

    @property
    def enabled(self) -> bool:
        """Whether it takes part."""

    @property
    def virtual_tokens(self) -> int:
        """L."""

    def pair(self, block: int) -> tuple[Tensor, Tensor]:
        """Key and value of a block, each [H, L, D]."""


class _Seat(NamedTuple):
    """What an attention module gets: the block's keys and values, or nothing where it is not one of them.

    The source is held weakly: it holds the model, which would then never be freed.
    """

    source: ReferenceType[KeyValues] | None
    block: int


_seats: WeakKeyDictionary[nn.Module, _Seat] = WeakKeyDictionary()


def obstacle(model: nn.Module, found: Attending | None) -> str:
    """Why keys and values cannot go by the attention interface of a model, in words that follow "because"; or empty."""
    if found is None:
        return "its attention does not go through transformers' attention interface"
    if not found.positions:
        return "no module without parts takes in its positions"
    for name in {_implementation(model, module.name) for module in found.modules}:
        if not _makes_masks(name):
            return f"its attention is {name}, which takes no mask with a column a key: load it with sdpa"
    return ""


def hooks(model: nn.Module, found: Attending, source: KeyValues) -> Iterator[Removable]:
    """Exchange the attention and move positions; taking the handles away undoes it.

    Args:
        model: real or without weights.
        found: where it attends and takes in positions.
        source: what its blocks get.
    """
    for module in found.modules:
        yield _Seated(model.get_submodule(module.name), _Seat(ReferenceType(source), module.block))
    for name in found.others:
        yield _Seated(model.get_submodule(name), _Seat(None, 0))
    configs = [getattr(model.get_submodule(module.name), "config", None) for module in found.modules]
    for config in {id(config): config for config in configs}.values():
        yield _Exchanged(config)
    for place in found.positions:
        hook = functools.partial(_moved, place, source)
        yield model.get_submodule(place.name).register_forward_pre_hook(hook, with_kwargs=True)


class _Seated:
    """A module that is known, until it is removed."""

    def __init__(self, module: nn.Module, seat: _Seat) -> None:
        self.module = module
        _seats[module] = seat

    def remove(self) -> None:
        """Forget it."""
        _seats.pop(self.module, None)


class _Exchanged:
    """A configuration whose attention goes by our name, until it is removed."""

    def __init__(self, config: Any) -> None:
        self.config, self.before = config, config._attn_implementation
        config._attn_implementation = _registered(self.before)

    def remove(self) -> None:
        """Give it the old name again."""
        self.config._attn_implementation = self.before


def _implementation(model: nn.Module, name: str) -> str:
    """Name of the attention that a module asks the interface for."""
    config: Any = getattr(model.get_submodule(name), "config", None)
    return str(getattr(config, "_attn_implementation", None))


def _makes_masks(implementation: str) -> bool:
    """Whether an implementation is given its mask as numbers or truth values, a row for each query; found by trying."""
    from transformers import AttentionMaskInterface

    make = AttentionMaskInterface().get(implementation)
    if make is None:
        return False
    sizes = {"batch_size": 1, "q_length": 2, "kv_length": 2, "q_offset": 0, "kv_offset": 0}
    mask = make(**sizes, allow_is_causal_skip=False, dtype=torch.float32, device=torch.device("cpu"))
    return isinstance(mask, Tensor) and mask.dim() == 4


def _registered(implementation: str) -> str:
    """Our name for an implementation with keys and values before it, known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"{NAME}_{implementation}"
    beneath: Callable[..., Any] | None = AttentionInterface().get(implementation)
    attend = functools.partial(_attend, beneath)
    if beneath is not None:  # modules made for one implementation see through ours by inspect.unwrap
        attend.__wrapped__ = beneath  # type: ignore[attr-defined]
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[implementation])
    return name


def _attend(
    beneath: Callable[..., Any] | None,
    module: nn.Module,
    query_BHSD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    mask: Tensor | None,
    *args: Any,
    **options: Any,
) -> Any:
    """What attention modules call in place of `beneath` (None: what their modelling file writes out)."""
    seat = _seats.get(module)
    if seat is None:
        raise RuntimeError("a copy of an adapted model cannot be run: detach the adapter, copy, and attach it anew")
    source = None if seat.source is None else seat.source()
    if source is not None and source.enabled:
        key_HLD, value_HLD = source.pair(seat.block)
        batch, length = key_BHTD.shape[0], key_HLD.shape[1]
        # Written-out attention hides nothing by itself; the others take an absent mask for a causal one.
        causal = beneath is not None and _is_causal(module, options)
        mask = _widened(mask, query_BHSD, key_BHTD, length, causal)
        key_BHTD, value_BHTD = (
            torch.cat([trained.to(given).expand(batch, -1, -1, -1), given], dim=2)
            for trained, given in ((key_HLD, key_BHTD), (value_HLD, value_BHTD))
        )
    return (beneath or _written_out(module))(module, query_BHSD, key_BHTD, value_BHTD, mask, *args, **options)


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    """As transformers' own functions read it."""
    said = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def _widened(mask: Tensor | None, query_BHSD: Tensor, key_BHTD: Tensor, length: int, causal: bool) -> Tensor | None:
    """The mask with L columns before it that every query sees; None where all see all."""
    queries, keys = query_BHSD.shape[2], key_BHTD.shape[2]
    if mask is None:
        if queries == 1 or not causal:
            return None
        # Without a mask, causal means that the first query sees the first key, however many keys follow.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query_BHSD.device).tril()[None, None]
    seen = 1 if mask.dtype == torch.bool else 0
    return torch.cat([mask.new_full((*mask.shape[:-1], length), seen), mask], dim=-1)


def _written_out(module: nn.Module) -> Callable[..., Any]:
    """The attention that the modelling file of a module writes out, under the name that transformers has for it."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise RuntimeError(f"{type(module).__name__} has no attention that is written out: load the model with sdpa")


def _moved(
    place: PositionInput, source: KeyValues, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A pre-hook: the positions of real tokens, moved behind the trained ones."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    if not source.enabled or place.argument not in given:
        return None
    positions: Tensor = given[place.argument]
    moved = positions + source.virtual_tokens
    padding = getattr(module, "padding_idx", None)
    if padding is not None:  # positions that mean padding keep on doing so
        moved = moved.where(positions != padding, positions)
    given[place.argument] = moved
    return tuple(given.pop(index) for index in range(len(args))), given

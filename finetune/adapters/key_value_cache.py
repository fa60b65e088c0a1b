"""Trained keys and values before those of the text, by way of a cache that is handed in.

For models whose attention does not go through transformers' interface, and for decoders that read an encoder, whose
positions and relative biases are counted from the cache: the stack is given a cache that holds the trained keys and
values already, as if it had read a text of that length. Masks get as many columns, given positions are moved; in
generation the empty cache of the first step is filled, and goes on holding them.

Shape suffixes: B rows, H heads of keys and values, L trained positions, S queries, D features of a head.
"""

from __future__ import annotations

import dataclasses
import inspect as signatures
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.input import Removable, by_name
from finetune.adapters.key_value_attention import KeyValues
from finetune.errors import ConfigError
from finetune.structure import Stack
from finetune.structure.experiments import UNFORESEEN, in_mode, twin_of

CACHE, MASK, POSITIONS = "past_key_values", "attention_mask", "position_ids"
"""Arguments of a stack of transformers."""


def kept(model: nn.Module, stack: Stack) -> list[tuple[int, int, int]]:
    """What each block of a stack keeps in a cache: heads, features of a key, features of a value.

    Empty where the stack takes no cache, or leaves it empty for some block. Found on a twin without weights.
    """
    if CACHE not in signatures.signature(model.get_submodule(stack.name).forward).parameters:
        return []
    try:
        with torch.device("meta"):
            found = read(twin_of(model), stack, torch.zeros(1, 3, dtype=torch.long))
    except UNFORESEEN:
        return []
    shapes = [(key.shape[1], key.shape[3], value.shape[3]) for key, value in found]
    return shapes if len(shapes) == len(stack.blocks) else []


@torch.no_grad()
def read(model: nn.Module, stack: Stack, ids_BS: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, H, S, D] that the blocks of a stack compute for some tokens."""
    cache = _made(stack)
    with in_mode(model, training=False):
        model.get_submodule(stack.name)(**{"input_ids": ids_BS, MASK: torch.ones_like(ids_BS), CACHE: cache})
    return [(layer.keys, layer.values) for layer in _own(cache).layers if layer.keys is not None]


def hooks(model: nn.Module, stack: Stack, source: KeyValues) -> Iterator[Removable]:
    """Hand the cache in; taking the handles away undoes it.

    Args:
        stack: whose blocks get keys and values.
        source: what they get.
    """
    module = model.get_submodule(stack.name)
    signature = signatures.signature(module.forward)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not source.enabled:
            return None
        return (), _handed(by_name(signature, args, kwargs), stack, source, embeddings.weight.dtype)

    def after(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        # Who asked for no cache must not get ours: generation would go on with it.
        if not source.enabled or kwargs.get("use_cache") is not False or not dataclasses.is_dataclass(output):
            return output
        return dataclasses.replace(output, **{CACHE: None})  # type: ignore[type-var]

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after, with_kwargs=True)


def _handed(inputs: dict[str, Any], stack: Stack, source: KeyValues, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a stack, with the trained keys and values in the cache, and seen."""
    length = source.virtual_tokens
    tokens = next(inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None)
    cache = inputs.get(CACHE)
    inputs[CACHE] = cache = _made(stack) if cache is None else cache
    if getattr(cache, "is_compileable", False):
        raise ConfigError("a cache of fixed size has no room for the prefix of this model: generate with a dynamic one")
    if _own(cache).get_seq_length() == 0:
        for block in range(len(stack.blocks)):
            key, value = (half.to(tokens.device, dtype).expand(len(tokens), -1, -1, -1) for half in source.pair(block))
            _own(cache).update(key, value, block)
    mask: Tensor | None = inputs.get(MASK)
    if mask is not None:
        # A mask of numbers is added to scores, one of a row's tokens says which are there.
        seen = 0 if mask.dim() == 4 and mask.is_floating_point() else 1
        inputs[MASK] = torch.cat([mask.new_full((*mask.shape[:-1], length), seen), mask], dim=-1)
    if inputs.get(POSITIONS) is not None:
        inputs[POSITIONS] = inputs[POSITIONS] + length
    return inputs


def _made(stack: Stack) -> Any:
    """An empty cache of the kind that a stack takes."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if stack.reads else DynamicCache()


def _own(cache: Any) -> Any:
    """The part of a cache that holds a stack's own sequence."""
    return getattr(cache, "self_attention_cache", cache)

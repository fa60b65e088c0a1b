"""Our attention as transformers knows it: a function and a mask under one name of its attention interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune.kernels.fused import attention, serves_attention

NAME = "finetune"
"""What `config._attn_implementation` says. transformers does not write it to config.json."""

_PLAIN = ("sliding_window", "position_ids", "use_cache", "output_attentions", "is_causal", "cache_position")
"""Options that change nothing here: the mask holds the window."""


class Call(NamedTuple):
    """What a module handed to the attention."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


_recorded: list[Call] | None = None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What attention modules of transformers call: heads [B, H, S, D] in, attended values [B, S, H, D] out.

    By our kernel where it serves, else by torch's (which also knows softcaps and what else models ask for, or says so).
    """
    if _recorded is not None:
        asked = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **options}
        _recorded.append(Call(module, query, key, value, attention_mask, asked))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if dropout or not _plain(options) or not _served(query, key, value, attention_mask, causal, scaling):
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return out, None
    if attention_mask is not None:
        attention_mask = attention_mask.expand(query.shape[0], 1, -1, -1)
    return attention(query, key, value, attention_mask, causal=causal, scale=scaling), None


def _plain(options: dict[str, Any]) -> bool:
    """Whether options ask for nothing but softmax attention."""
    return all(value is None or value is False or name in _PLAIN for name, value in options.items())


def _served(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float | None
) -> bool:
    """Whether our kernel takes this call; a step of decoding is better served by torch's."""
    queries, keys = query.shape[2], key.shape[2]
    if query.device.type != "cpu" or queries == 1:
        return False
    if mask is None:
        fits = not causal or queries == keys
    else:
        fits = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:] == (1, queries, keys)
    return fits and serves_attention(query, key, value, 1.0 if scaling is None else scaling)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Within it, what modules hand to the attention. Not for several threads."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def register() -> None:
    """Make the name known to transformers, with the mask of sdpa: without a mask packed rows would see each other."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)

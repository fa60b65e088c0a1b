"""Modules that compute with fused operators what modules of transformers compute with many; see exchange.py.

Each is made from the module that it stands for: of its class, with its parameters, children and attributes, so that
names, checkpoints and whatever else reads them find what they found. Only `forward` differs, and what that does not
serve goes to the forward of the class.

Shape suffixes: B rows, S positions, I features, H heads, D features of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from finetune.kernels.fused import act_mul, rms_norm, rope
from finetune.model.attention import attention_forward
from finetune.structure.exchangeable import GatedLayers, RotaryLayers


class FusedModule(nn.Module):
    """What stands for another module."""

    fused: Any

    @classmethod
    def of(cls, original: nn.Module, settings: Any) -> FusedModule:
        """The stand-in for a module; both share parameters, children and hooks."""
        made: FusedModule = object.__new__(_subclass(cls, type(original)))
        made.__dict__.update(original.__dict__)
        made.__dict__["fused"] = settings
        return made


_subclasses: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def _subclass(fused: type[Any], original: type[Any]) -> type[Any]:
    """A class of both: what asks for the original's class finds it."""
    name = f"{fused.__name__}{original.__name__}"
    return _subclasses.setdefault((fused, original), type(name, (fused, original), {"__module__": __name__}))


@dataclass(frozen=True)
class Norm:
    """How a module norms: `x / sqrt(mean(x^2) + eps) * (weight + offset)`."""

    eps: float
    offset: float


class FusedNorm(FusedModule):
    """RMSNorm as one operator."""

    fused: Norm
    weight: nn.Parameter

    def forward(self, x_BSI: Tensor) -> Tensor:
        """The normed features, in the dtype of the input."""
        return rms_norm(x_BSI, self.weight, self.fused.eps, self.fused.offset)


@dataclass(frozen=True)
class Gated:
    """How a module gates: which projections, and what it does to the gate."""

    layers: GatedLayers
    activation: str


class FusedGatedMLP(FusedModule):
    """`down(act(gate(x)) * up(x))` with the middle as one operator. `layers.pair` is gate, up; or both in one."""

    fused: Gated

    def forward(self, x_BSI: Tensor) -> Tensor:
        """The features handed on."""
        layers = self.fused.layers
        parts = [getattr(self, name)(x_BSI) for name in layers.pair]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        result: Tensor = getattr(self, layers.down)(act_mul(gate, up, self.fused.activation))
        return result


@dataclass(frozen=True)
class Rotary:
    """What an attention module does around its projections.

    Attributes:
        layers: its parts.
        scaling: of the scores.
        extra: what else it hands to the attention function.
    """

    layers: RotaryLayers
    scaling: float
    extra: tuple[tuple[str, Any], ...]


class FusedRotaryAttention(FusedModule):
    """Attention with the rotation of queries and keys as one operator each; decoding with a cache is the class's."""

    fused: Rotary
    config: Any
    attention_dropout: float

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attended features and None."""
        embeddings = kwargs.get("position_embeddings")
        attend = _ours(self.config._attn_implementation)
        cached = bool(args) or kwargs.get("past_key_values") is not None
        if attend is None or cached or embeddings is None or embeddings[0].dtype != hidden_states.dtype:
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = self.rotated(hidden_states, *embeddings)
        options = {name: v for name, v in kwargs.items() if name not in _OWN} | dict(self.fused.extra)
        dropout = getattr(self, "attention_dropout", 0.0) if self.training else 0.0
        attended, weights = attend(
            self, query, key, value, kwargs.get("attention_mask"), dropout, self.fused.scaling, **options
        )
        return getattr(self, self.fused.layers.out)(attended.flatten(2)), weights

    def rotated(self, hidden_BSI: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as [B, H, S, D]."""
        layers = self.fused.layers
        heads = (*hidden_BSI.shape[:-1], -1, layers.head_dim)
        query, key, value = (getattr(self, n)(hidden_BSI).view(heads) for n in (layers.query, layers.key, layers.value))
        if layers.query_norm is not None and layers.key_norm is not None:
            query, key = getattr(self, layers.query_norm)(query), getattr(self, layers.key_norm)(key)
        query, key = rope(query, cos, sin), rope(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _ours(implementation: str) -> Callable[..., Any] | None:
    """The attention of that name where it is our function, or something that stands before it, as a wrapper does."""
    attend = AttentionInterface().get(implementation)
    return attend if attend is not None and inspect.unwrap(attend) is attention_forward else None


_OWN = ("position_embeddings", "attention_mask", "past_key_values")
"""Arguments of an attention module that it does not hand on to the attention function."""

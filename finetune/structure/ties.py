"""Which modules share the weight of the token embeddings: the head, and the embeddings of a second stack."""

from __future__ import annotations

from typing import Any

from torch import nn


def accessor(model: nn.Module, method: str) -> nn.Module | None:
    """What one of transformers' accessors returns; None where the model has no such thing."""
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def tied_modules(model: nn.Module, embeddings: str | None, head: str | None) -> tuple[str, ...]:
    """Names of the modules that share the weight of the embeddings, these included; none where nobody shares it.

    Two modules share a weight where it is one tensor, or where both are on meta, not joined yet, and transformers is
    going to join them.
    """
    if embeddings is None:
        return ()
    joined: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    candidates = {embeddings, *([head] if head else [])}
    candidates |= {k.removesuffix(".weight") for pair in joined.items() for k in pair if k.endswith(".weight")}
    modules = dict(model.named_modules())
    order = [name for name in modules if name in candidates]
    tensor: Any = getattr(modules[embeddings], "weight", None)

    def shares(name: str) -> bool:
        other: Any = getattr(modules[name], "weight", None)
        if name == embeddings or other is None or tensor is None:
            return name == embeddings
        if other is tensor:
            return True
        return bool(other.is_meta and tensor.is_meta) and _root(joined, name) == _root(joined, embeddings)

    found = tuple(name for name in order if shares(name))
    return found if len(found) > 1 else ()


def _root(joined: dict[str, str], name: str) -> str:
    """The key that a module's weight is going to be joined to, at the end of the chain."""
    key = f"{name}.weight"
    seen = {key}
    while key in joined and joined[key] not in seen:
        key = joined[key]
        seen.add(key)
    return key

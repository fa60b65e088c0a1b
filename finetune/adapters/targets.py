"""Which projections an adapter touches, by names as people write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from finetune.errors import ConfigError, nearest
from finetune.structure import Projection, Structure

ALL_LINEAR = "all-linear"


def check_targets(targets: object, words: Sequence[str] = (ALL_LINEAR,)) -> None:
    """Refuse what `adapter.targets` cannot be, before any model is loaded.

    Args:
        words: what it may be besides a list.

    Raises:
        ConfigError: unless it is one of the words or a list of at least one pattern.
    """
    if targets in words:
        return
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        hint = f"; did you mean [{targets}]?" if isinstance(targets, str) else ""
        expected = ", ".join(words)
        raise ConfigError(f"adapter.targets is {targets!r}: expected {expected} or a list of names or globs{hint}")
    if not targets or not all(isinstance(pattern, str) and pattern for pattern in targets):
        raise ConfigError(
            f"adapter.targets is {list(targets)!r}: expected at least one name or glob, e.g. [q_proj, v_proj]"
        )


def is_glob(pattern: str) -> bool:
    """Whether a pattern has signs that stand for others."""
    return any(sign in pattern for sign in "*?[")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a dotted name: its last part(s), the whole of it, or a glob over either."""
    if is_glob(pattern):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def select(
    projections: Iterable[Projection],
    targets: str | Sequence[str],
    head: Projection | None = None,
    embedding: Projection | None = None,
) -> list[Projection]:
    """The projections that `adapter.targets` names, in module order.

    Args:
        projections: those of the blocks; `all-linear` means every one of them.
        targets: `all-linear` or patterns.
        head: the output head, chosen only by a pattern that matches it.
        embedding: the token embedding, chosen only by its name: a glob means what multiplies hidden states.

    Raises:
        ConfigError: for a pattern that matches nothing, with the names there are.
    """
    inside = list(projections)
    if isinstance(targets, str):
        return inside
    candidates = ([embedding] if embedding else []) + inside + ([head] if head else [])

    def means(pattern: str, p: Projection) -> bool:
        return matches(pattern, p.name) and (p is not embedding or not is_glob(pattern))

    for pattern in targets:
        if not any(means(pattern, p) for p in candidates):
            leaves = sorted({p.leaf for p in candidates})
            raise ConfigError(
                f"adapter.targets: {pattern!r} matches no projection of the model;"
                f" have {', '.join(leaves)}{nearest(pattern.rpartition('.')[2], leaves)}"
            )
    return [p for p in candidates if any(means(pattern, p) for pattern in targets)]


def check_embedding(method: str, embeds: bool, embedding: Projection, structure: Structure) -> None:
    """Refuse a targeted token embedding that the method cannot stand beside, or that merging would tear from another.

    Args:
        embeds: whether the method has a form for it.

    Raises:
        ConfigError: naming both, and what to do instead.
    """
    name = embedding.name
    if not embeds:
        raise ConfigError(
            f"adapter.targets names {name}, a token embedding, for which adapter={method} has no form: leave it out,"
            f" or train it whole by adapter.train_also=[{name}]"
        )
    sharing = [other for other in structure.ties if other != name]
    if sharing:
        whole = structure.tied and sharing == [structure.head]
        instead = f"use adapter.train_also=[{structure.head}, {name}]" if whole else "leave it out"
        raise ConfigError(
            f"adapter.targets names {name}, whose weight is tied to {', '.join(sharing)}: merging would tear them"
            f" apart; {instead}"
        )

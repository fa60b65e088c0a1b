"""Which projections an adapter touches, by names as people write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from finetune.errors import ConfigError, nearest
from finetune.structure import Projection

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


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a dotted name: its last part(s), the whole of it, or a glob over either."""
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def select(
    projections: Iterable[Projection], targets: str | Sequence[str], head: Projection | None = None
) -> list[Projection]:
    """The projections that `adapter.targets` names, in module order.

    Args:
        projections: those of the blocks; `all-linear` means every one of them.
        targets: `all-linear` or patterns.
        head: the output head, chosen only by a pattern that matches it.

    Raises:
        ConfigError: for a pattern that matches nothing, with the names there are.
    """
    inside = list(projections)
    if isinstance(targets, str):
        return inside
    candidates = inside + ([head] if head else [])
    for pattern in targets:
        if not any(matches(pattern, p.name) for p in candidates):
            leaves = sorted({p.leaf for p in candidates})
            raise ConfigError(
                f"adapter.targets: {pattern!r} matches no projection of the model;"
                f" have {', '.join(leaves)}{nearest(pattern.rpartition('.')[2], leaves)}"
            )
    return [p for p in candidates if any(matches(pattern, p.name) for pattern in targets)]

"""What can go wrong in a way that the user can mend, and what the process then exits with.

The command line turns every `UserError` into one line on stderr and its `exit_code`; anything else
that escapes is a bug of ours and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: one line that names the file, key or row, the value seen and what was expected."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, out of range, or conflicts with another."""


class DataError(UserError):
    """A data file or its rows cannot be used."""


class ModelError(UserError):
    """A checkpoint, tokenizer or adapter on disk cannot be used."""


class RunError(UserError):
    """A run directory cannot be used, or the run had to stop for a cause the user can mend."""


class ProofError(UserError):
    """An export did not pass its proof; the others stand and the run is finished."""

    exit_code = 3


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the choice nearest to `word`, or an empty string when none is near."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def nearest_or_all(word: str, choices: Iterable[str]) -> str:
    """As `nearest`; where none is near, `"; have x, y"` with all of them: others call the same thing by other names."""
    known = sorted(choices)
    return nearest(word, known) or f"; have {', '.join(known)}"

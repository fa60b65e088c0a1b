"""What every data format is turned into: a conversation, of which some turns are learnt."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class BadRow(Exception):
    """One row cannot be learnt from; the message says why. It is counted and skipped, see `validation.Faults`."""


@dataclass(frozen=True)
class Turn:
    """One turn.

    Attributes:
        role: system | user | assistant | tool.
        text: what is said.
        learn: whether the model is to learn to say it.
        context: what the text is to be applied to (Alpaca's `input`); the chat template says how the two are joined.
        calls: tool calls, `{"name": ..., "arguments": {...}}` each.
    """

    role: str
    text: str
    learn: bool = False
    context: str = ""
    calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the tools they may call.

    Attributes:
        turns: in order.
        tools: JSON schemas of the tools the assistant may call.
        plain: the turns' texts follow one another as they are, without a chat template.
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    plain: bool = False

    def digest(self) -> bytes:
        """16 bytes that only an equal conversation has."""
        return _digest([self.turns, self.tools, self.plain])

    def prompt_digest(self) -> bytes:
        """16 bytes shared by conversations that begin alike, up to the first learnt turn; of a plain text all of it."""
        first = next((i for i, turn in enumerate(self.turns) if turn.learn), 0)
        return _digest([self.turns[:first]]) if first else self.digest()


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=lambda item: list(vars(item).values()))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

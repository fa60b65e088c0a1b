"""Faulty rows: found, counted, shown, and tolerated up to a share."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.data.conversation import BadRow, Conversation
from finetune.errors import DataError

SHOWN = 5
"""Faulty rows listed in a message."""


def check_turns(conversation: Conversation) -> Conversation:
    """The conversation without turns after its last answer, if it is in order.

    In order means: at most one system turn, which comes first; then a user; a user follows an answer; an answer
    follows a user or a tool; a tool follows an answer or another tool. Every learnt answer says or calls something.

    Raises:
        BadRow: naming the first turn that is out of order or empty.
    """
    after = {
        "": {"system", "user"}, "system": {"user"}, "user": {"assistant"}, "assistant": {"user", "tool"},
        "tool": {"tool", "assistant"},
    }  # fmt: skip
    previous = ""
    for number, turn in enumerate(conversation.turns, 1):
        if not conversation.plain and turn.role not in after[previous]:
            where = f"after {previous}" if previous else "at the beginning"
            raise BadRow(f"roles out of order: turn {number} is {turn.role} {where}")
        if turn.learn and not turn.text.strip() and not turn.calls:
            raise BadRow(
                "the text is empty" if len(conversation.turns) == 1 else f"the answer is empty (turn {number})"
            )
        try:
            (turn.text + turn.context).encode()
        except UnicodeEncodeError:
            raise BadRow(f"turn {number} holds half of a surrogate pair, which is no character") from None
        previous = turn.role
    last = max((i for i, turn in enumerate(conversation.turns) if turn.learn), default=None)
    if last is None:
        raise BadRow("nothing to learn: it has no answer")
    return Conversation(conversation.turns[: last + 1], conversation.tools, conversation.plain)


@dataclass
class Faults:
    """The rows that were skipped.

    Attributes:
        shown: `file:line: reason` of the first few.
        origins: where all of them stand.
    """

    shown: list[str] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """How many rows are faulty."""
        return len(self.origins)

    def add(self, origin: str, reason: str) -> None:
        """Count a faulty row; once, though several of its answers be faulty."""
        if origin not in self.origins and len(self.shown) < SHOWN:
            self.shown.append(f"{origin}: {reason}")
        self.origins.add(origin)

    def check(self, key: str, rows: int, usable: int, max_bad_fraction: float, otherwise: str = "") -> None:
        """Refuse data with too many faulty rows, or none that can be used.

        Args:
            key: `data.train` or `data.eval`.
            rows: read in all, faulty ones included.
            usable: left to learn from.
            max_bad_fraction: tolerated share.
            otherwise: why rows that are not faulty cannot be used either.

        Raises:
            DataError: listing the first few.
        """
        listed = "; ".join(self.shown)
        if self.count > max_bad_fraction * rows:
            share = 100 * self.count / rows
            raise DataError(
                f"{key}: {self.count} of {rows} rows are faulty ({share:.3g} %, "
                f"data.max_bad_fraction={max_bad_fraction:g} allows {100 * max_bad_fraction:g} %): {listed}"
            )
        if not usable:
            reasons = "; ".join(reason for reason in (otherwise, listed) if reason)
            raise DataError(f"{key}: none of {rows} rows can be used" + (f": {reasons}" if reasons else ""))

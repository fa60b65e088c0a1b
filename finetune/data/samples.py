"""Held-out prompts that a person can read the answers to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.data.conversation import Conversation
from finetune.data.templates import ChatTemplate, render


@dataclass(frozen=True)
class Sample:
    """A prompt and what its row answers.

    Attributes:
        prompt: the text to feed, as the chat template writes it, ready for an answer.
        reference: the row's own answer.
        prompt_ids: the prompt's tokens, special ones included; feed these, so that no BOS is added twice.
        token_types: of a row with a label, where the model reads them.
    """

    prompt: str
    reference: str
    prompt_ids: list[int] = field(default_factory=list)
    token_types: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def sample(conversation: Conversation, template: ChatTemplate | None, tokenizer: Any) -> Sample:
    """The first answer of a conversation and the prompt before it; of a plain text, its beginning and the rest."""
    rendered = render(conversation, template, tokenizer)
    prompt, reference = rendered.text[: rendered.spans[0][0]], rendered.answer
    if not prompt:
        cut = _beginning(reference)
        prompt, reference = reference[:cut], reference[cut:]
    ids = tokenizer(prompt, add_special_tokens=not rendered.templated)["input_ids"]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:  # of a tokenizer that ends every text
        ids = ids[:-1]
    return Sample(prompt, reference, ids)


def _beginning(text: str) -> int:
    """Where to cut a text for someone else to go on: behind a word, a third in, at most 300 characters."""
    goal = min(len(text) // 3, 300)
    space = text.find(" ", goal)
    return space + 1 if 0 <= space < 2 * len(text) // 3 else goal

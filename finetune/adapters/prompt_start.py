"""Where virtual tokens start: drawn at random, or from tokens of the vocabulary, or from those of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.adapters.input import InputConfig
from finetune.errors import ConfigError, nearest

STARTS = ("vocabulary", "text", "random")


@dataclass
class StartConfig(InputConfig):
    """An adapter of virtual tokens that start as something.

    Attributes:
        init: vocabulary (tokens drawn uniformly), text (those of `init_text`) or random.
        init_text: its tokens, as the base's tokenizer makes them of it, are repeated or cut to `prefix_length`.
    """

    init: str = "vocabulary"
    init_text: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.text_ids: list[int] = []
        if self.init not in STARTS:
            raise ConfigError(
                f"adapter.init is {self.init!r}: expected {' | '.join(STARTS)}{nearest(self.init, STARTS)}"
            )
        if (self.init == "text") != (self.init_text is not None):
            raise ConfigError(
                f"adapter.init is {self.init} and adapter.init_text {self.init_text!r}:"
                " expected init=text with a text, or neither"
            )

    def read_tokenizer(self, tokenizer: Any) -> None:
        """Remember the tokens of `init_text`.

        Raises:
            ConfigError: for a text without tokens.
        """
        if self.init_text is None:
            return
        self.text_ids = list(tokenizer(self.init_text)["input_ids"])
        if not self.text_ids:
            raise ConfigError(f"adapter.init_text is {self.init_text!r}, in which the tokenizer finds no token")

    def start_ids(self, vocabulary: int) -> Tensor | None:
        """Tokens [L] that virtual ones start as; None for a random start. Drawn from torch's global generator.

        Raises:
            ConfigError: for a text that no tokenizer was shown.
        """
        if self.init == "random":
            return None
        if self.init == "vocabulary":
            return torch.randint(vocabulary, (self.prefix_length,), device="cpu")
        if not self.text_ids:
            raise ConfigError("adapter.init=text needs a tokenizer: call config.read_tokenizer(tokenizer) first")
        repeats = -(-self.prefix_length // len(self.text_ids))
        return torch.tensor((self.text_ids * repeats)[: self.prefix_length], device="cpu")

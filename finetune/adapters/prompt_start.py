"""Where virtual tokens start: drawn at random, or from common words of the vocabulary, or from tokens of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.adapters.input import InputConfig
from finetune.errors import ConfigError, nearest

COMMON = 100
"""Words that are drawn from. Lester et al. 2021 (section 3.2) draw from the 5,000 most common tokens."""
LARGE = 50.0
"""How many times as large drawn words are made. What blocks add to a hidden state is tens of times as large as an
embedding; a token that is as large as that stays, in every layer, what it learns to be."""


@dataclass
class DrawnConfig(InputConfig):
    """An adapter of virtual tokens that start as drawn words, or as noise.

    Rare tokens, most of a vocabulary, draw attention away from the text: a model that reads twenty of them first says
    less of it, and learns slower to say more, than one that reads twenty words such as "the" and "of".

    Attributes:
        init: vocabulary (common words, drawn uniformly) or random.
    """

    inits: ClassVar[tuple[str, ...]] = ("vocabulary", "random")

    init: str = "vocabulary"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.word_ids: list[int] = []
        if self.init not in self.inits:
            raise ConfigError(
                f"adapter.init is {self.init!r}: expected {' | '.join(self.inits)}{nearest(self.init, self.inits)}"
            )

    def read_tokenizer(self, tokenizer: Any) -> None:
        """Remember the common words."""
        if self.init == "vocabulary":
            self.word_ids = common_words(tokenizer)

    def drawn_ids(self, vocabulary: int) -> Tensor:
        """Words [L], drawn from torch's global generator; of any tokens where no tokenizer has words, or was shown."""
        words = [word for word in self.word_ids if word < vocabulary] or range(vocabulary)
        return torch.tensor(words)[torch.randint(len(words), (self.prefix_length,), device="cpu")]


@dataclass
class StartConfig(DrawnConfig):
    """An adapter of virtual tokens that may start as a text.

    Attributes:
        init: vocabulary (common words, drawn uniformly), text (tokens of `init_text`) or random.
        init_text: its tokens, as the base's tokenizer makes them of it, are repeated or cut to `prefix_length`.
    """

    inits: ClassVar[tuple[str, ...]] = ("vocabulary", "text", "random")

    init_text: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.text_ids: list[int] = []
        if (self.init == "text") != (self.init_text is not None):
            raise ConfigError(
                f"adapter.init is {self.init} and adapter.init_text {self.init_text!r}:"
                " expected init=text with a text, or neither"
            )

    def read_tokenizer(self, tokenizer: Any) -> None:
        """Remember the common words, or the tokens of `init_text`.

        Raises:
            ConfigError: for a text without tokens.
        """
        super().read_tokenizer(tokenizer)
        if self.init_text is None:
            return
        self.text_ids = list(tokenizer(self.init_text)["input_ids"])
        if not self.text_ids:
            raise ConfigError(f"adapter.init_text is {self.init_text!r}, in which the tokenizer finds no token")

    def start_ids(self, vocabulary: int) -> Tensor | None:
        """Tokens [L] that virtual ones start as; None for a random start.

        Raises:
            ConfigError: for a text that no tokenizer was shown.
        """
        if self.init == "random":
            return None
        if self.init == "vocabulary":
            return self.drawn_ids(vocabulary)
        if not self.text_ids:
            raise ConfigError("adapter.init=text needs a tokenizer: call config.read_tokenizer(tokenizer) first")
        repeats = -(-self.prefix_length // len(self.text_ids))
        return torch.tensor((self.text_ids * repeats)[: self.prefix_length], device="cpu")


@dataclass
class LargeStartConfig(StartConfig):
    """An adapter of virtual tokens that go through the layers beside the text.

    Attributes:
        start_scale: they start so many times as large as embeddings of tokens; null for 50, of a text for 1: it then
            says what it says. Noise is as large as torch draws it.
    """

    start_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_scale is None:
            return
        if self.init == "random":
            raise ConfigError(f"adapter.start_scale is {self.start_scale} and adapter.init random: expected null")
        if not (self.start_scale > 0 and math.isfinite(self.start_scale)):
            raise ConfigError(f"adapter.start_scale is {self.start_scale}: expected more than 0, or null")

    def scale_of_start(self) -> float:
        """What embeddings of tokens are multiplied by."""
        if self.start_scale is not None:
            return self.start_scale
        return LARGE if self.init == "vocabulary" else 1.0


def common_words(tokenizer: Any) -> list[int]:
    """Tokens of the most common words, or pieces of words.

    Vocabularies list their tokens by how common they are, those of WordPiece and unigrams as they were counted, those
    of BPE as they were merged; before them stand what is special and single characters.
    """
    texts = (tokenizer.decode([token]).strip() for token in range(len(tokenizer)))
    words = (token for token, text in enumerate(texts) if len(text) > 1 and text.isalpha())
    return list(islice(words, COMMON))

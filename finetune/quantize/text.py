"""Calibration and held-out text as pieces of tokens, none of them padded; what is wrong with it is told at once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.config import DataConfig
from finetune.data.files import check_file
from finetune.data.formats import Format
from finetune.data.lengths import longest
from finetune.data.rows import Batch
from finetune.data.sources import Source, recognise_all, resolve
from finetune.data.templates import choose_template
from finetune.data.tokenizing import Recipe, tokenize_side
from finetune.errors import DataError
from finetune.quant.base import QuantConfig
from finetune.quantize.config import CalibrationConfig

HELD_OUT = 10
"""One piece of so many is held out where no other text is named to measure on."""
MOST_EVAL = 64
"""Pieces that are measured on, at most."""
UNKNOWN = 0.5
"""A larger share of unknown tokens than this means that the text is in another vocabulary."""
BATCH_TOKENS = 4096
"""Tokens that are run at a time."""
MOST_NUMBERS = 1 << 26
"""Log-probabilities of the dense model that are kept, at most: 256 MiB."""
BATCH_NUMBERS = 1 << 24
"""Log-probabilities that a batch of more than one piece may take."""


@dataclass
class Text:
    """Pieces of tokens, int64 [length] each.

    Attributes:
        calibration: to calibrate on; empty without calibration data.
        eval: to measure on; empty where there is nothing to hold out.
        labelled: whether rows of `eval` come with the classes that they are of.
    """

    calibration: list[Tensor] = field(default_factory=list)
    eval: list[Tensor] = field(default_factory=list)
    labelled: bool = False

    @property
    def tokens(self) -> int:
        """That are calibrated on."""
        return sum(map(len, self.calibration))

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure on."""
        return bool(self.eval)

    def batches(self, tokens: int = BATCH_TOKENS) -> list[dict[str, Any]]:
        """What the model is called with to calibrate, so many tokens at a time at most."""
        return batches_of(self.calibration, tokens)

    def measured(self, width: int) -> list[Batch]:
        """What the model is called with to measure.

        Args:
            width: numbers that are compared at each position.
        """
        return measured_on(self.eval, width)

    def digests(self) -> dict[str, str]:
        """Of the tokens and where they are cut, by side."""
        return {"calibration": _digest(self.calibration), "eval": _digest(self.eval)}


def check_text(config: CalibrationConfig) -> None:
    """Look at what can be seen without a tokenizer.

    Raises:
        DataError: naming the file and what is wrong with it.
        ConfigError: for a source of the wrong kind.
    """
    for key, value in (("data.calibration", config.calibration), ("data.eval", config.eval)):
        for source in [] if value is None else resolve(value, key):
            for path in source.files:
                check_file(path)
            if source.files:
                forms_of(config.reading(value), [source])


def forms_of(data: DataConfig, sources: list[Source], *, labels_first: bool = False) -> tuple[list[Format], bool]:
    """The formats of sources, and whether they are rows with labels: read so where nothing else fits.

    Args:
        labels_first: read them so wherever that fits.

    Raises:
        DataError: where no format fits.
    """
    ways = [(data, False), (replace(data, format="labelled"), True)]
    if data.format == "labelled":
        ways = ways[1:]
    elif data.format != "auto":
        ways = ways[:1]
    refused: DataError | None = None
    for way, labelled in reversed(ways) if labels_first else ways:
        try:
            return recognise_all(way, sources), labelled
        except DataError as error:
            refused = error if refused is None or not labelled else refused
    assert refused is not None
    raise refused


def read_text(config: CalibrationConfig, tokenizer: Any, vocabulary: int, context: int, quant: QuantConfig) -> Text:
    """The pieces to calibrate and to measure on.

    Args:
        vocabulary: rows of the model's embeddings.
        context: tokens that the model can attend over.
        quant: whose groups have to be smaller than the text.

    Raises:
        DataError: for text that is empty, nothing but padding, in another vocabulary, or shorter than a group.
        ConfigError: for settings that conflict with the model.
    """
    length = longest(config.max_length, context)
    text = Text()
    if config.eval is not None:
        text.eval = _pieces("data.eval", config.eval, config, tokenizer, vocabulary, length)
    if config.calibration is not None:
        pieces = _pieces("data.calibration", config.calibration, config, tokenizer, vocabulary, length)
        if config.eval is None and len(pieces) > 1:
            every = min(HELD_OUT, len(pieces))
            text.eval = pieces[every - 1 :: every]
            pieces = [piece for number, piece in enumerate(pieces, 1) if number % every]
        text.calibration = pieces[: config.samples]
        check_enough(text.tokens, quant)
    text.eval = text.eval[:MOST_EVAL]
    return text


def batches_of(pieces: list[Tensor], tokens: int = BATCH_TOKENS) -> list[dict[str, Any]]:
    """What the model is called with: pieces of one length together, of so many tokens at most, or one piece."""
    tokens = min(tokens, BATCH_TOKENS)
    by_length: dict[int, list[Tensor]] = {}
    for piece in pieces:
        by_length.setdefault(len(piece), []).append(piece)
    return [
        {"input_ids": torch.stack(alike[start : start + max(1, tokens // length)]), "use_cache": False}
        for length, alike in by_length.items()
        for start in range(0, len(alike), max(1, tokens // length))
    ]


def measured_on(pieces: list[Tensor], vocabulary: int) -> list[Batch]:
    """Rows to measure on: as many of the pieces as there is room for.

    Args:
        vocabulary: predictions that the model makes at each position.
    """
    chosen: list[Tensor] = []
    room = MOST_NUMBERS // vocabulary
    for piece in pieces:
        if room < len(piece) and chosen:
            break
        chosen.append(piece)
        room -= len(piece)
    rows = []
    for inputs in batches_of(chosen, BATCH_NUMBERS // vocabulary):
        ids = inputs["input_ids"]
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        rows.append(Batch(ids, ids, positions, torch.ones_like(ids)))
    return rows


def _digest(pieces: list[Tensor]) -> str:
    digest = hashlib.sha256(repr([len(piece) for piece in pieces]).encode())
    for piece in pieces:
        digest.update(piece.numpy().tobytes())
    return digest.hexdigest()


def _pieces(
    key: str, value: Any, config: CalibrationConfig, tokenizer: Any, vocabulary: int, length: int
) -> list[Tensor]:
    """The rows of a source behind one another, in pieces of `length` tokens; the last may be shorter."""
    data, sources = config.reading(value), resolve(value, key, side="eval" if key == "data.eval" else "train")
    forms = recognise_all(data, sources)
    template = choose_template(config.chat_template, tokenizer, {form.kind for form in forms})
    ids = tokenize_side(key, sources, forms, Recipe(data, tokenizer, template, length)).rows.input_ids
    ids = check_tokens(key, ids.astype(np.int64), sources, tokenizer, vocabulary)
    tokens = torch.from_numpy(ids)
    return [piece for piece in tokens.split(length) if len(piece) > 1]


def check_tokens(key: str, ids: np.ndarray, sources: list[Source], tokenizer: Any, vocabulary: int) -> np.ndarray:
    """Tokens without padding.

    Raises:
        DataError: where there are none, or they are not the model's.
    """
    where = f"{key}: {', '.join(Path(source.name).name for source in sources)}"
    if len(ids) and int(ids.max()) >= vocabulary:
        raise DataError(
            f"{where} has token {int(ids.max())}, the model's embeddings have {vocabulary} rows: the tokenizer beside"
            " the model makes tokens of another vocabulary"
        )
    marks = [mark for mark in (tokenizer.eos_token_id, tokenizer.bos_token_id) if mark is not None]
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in marks:
        ids = ids[ids != tokenizer.pad_token_id]
    said = ids[~np.isin(ids, marks)]
    if not len(said):
        raise DataError(f"{where} holds nothing but padding: expected text")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in marks:
        share = float((said == tokenizer.unk_token_id).mean())
        if share > UNKNOWN:
            raise DataError(
                f"{where} is in another vocabulary: {share:.0%} of its tokens are {tokenizer.unk_token!r} to the"
                " model's tokenizer"
            )
    return ids


def check_enough(tokens: int, quant: QuantConfig) -> None:
    """Refuse text from which not even one group of weights can be told apart."""
    for key in ("group_size", "block_size"):
        size = getattr(quant, key, 0)
        if tokens < size:
            raise DataError(
                f"data.calibration leaves {tokens} tokens to calibrate on, fewer than the {size} weights of a group"
                f" (quant.{key}): expected more text"
            )

"""One side of the data, from sources to token rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from finetune.data.columns import describe, rename
from finetune.data.config import DataConfig
from finetune.data.conversation import BadRow, Conversation
from finetune.data.formats import Format
from finetune.data.labelled import LabelledEncoder
from finetune.data.labels import Labelling
from finetune.data.lengths import fit
from finetune.data.masking import Masker
from finetune.data.pairs import PairEncoder
from finetune.data.report import SideReport
from finetune.data.rows import Row, TokenRows
from finetune.data.sources import Source
from finetune.data.templates import ChatTemplate, Rendered, render
from finetune.data.validation import Faults, check_turns

_CHUNK = 256
"""Rows tokenized at once."""


@dataclass(frozen=True)
class Example:
    """A conversation and where it stands."""

    origin: str
    conversation: Conversation


@dataclass
class Side:
    """Token rows and, for each of them, what the split and the weights need to know.

    Attributes:
        rows: the tokens.
        prompts, digests: of the conversation a row comes from, see `Conversation`.
        weights: of its source.
        examples: number of that conversation in the order of reading.
        sources: number of its source.
        report: what happened on the way.
    """

    rows: TokenRows
    prompts: list[bytes] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    report: SideReport = field(default_factory=SideReport)


def read_examples(
    source: Source, form: Format, config: DataConfig, report: SideReport, faults: Faults
) -> Iterator[Example]:
    """A source's conversations; faulty rows are counted."""
    for raw in source.read():
        report.rows += 1
        try:
            if raw.fault is not None:
                raise BadRow(raw.fault)
            if not isinstance(raw.value, Mapping):
                raise BadRow(f"is {describe(raw.value)}: expected an object with columns")
            conversations = [check_turns(item) for item in form.convert(rename(raw.value, config.columns))]
        except BadRow as bad:
            faults.add(raw.origin, str(bad))
            continue
        report.examples += len(conversations)
        for conversation in conversations:
            yield Example(raw.origin, conversation)


@dataclass(frozen=True)
class Recipe:
    """How conversations become token rows.

    Attributes:
        config: what to do with rows that do not fit.
        tokenizer: a fast one.
        template: of chats and instructions.
        max_length: tokens a row.
        labelling: how labels are learnt, where rows have one in place of an answer.
        pairs: whether an encoder reads the prompt and a decoder writes the answer.
    """

    config: DataConfig
    tokenizer: Any
    template: ChatTemplate | None
    max_length: int
    labelling: Labelling | None = None
    pairs: bool = False

    def encoder(self) -> LabelledEncoder | PairEncoder | None:
        """What tokenizes rows with a label, or for an encoder and a decoder; None where rows are one text."""
        if self.pairs:
            return PairEncoder(self.tokenizer, self.max_length, self.config.too_long)
        if self.labelling is None:
            return None
        return LabelledEncoder(self.tokenizer, self.labelling, self.max_length, self.config.too_long)


def tokenize_side(key: str, sources: list[Source], forms: list[Format], recipe: Recipe) -> Side:
    """Read, check, render, tokenize, label and cut all rows of a side.

    Args:
        key: `data.train` or `data.eval`, in messages.
        sources, forms: where the rows come from and what they are.
        recipe: how.

    Raises:
        DataError: when too many rows are faulty, or none is left.
    """
    faults, side = Faults(), Side(TokenRows.of([]))
    encoder = recipe.encoder()
    tokenize = partial(_encoded_chunk, encoder) if encoder else partial(_tokenize_chunk, Masker(recipe.tokenizer))
    collected: list[Row] = []
    count = 0
    for number, (source, form) in enumerate(zip(sources, forms, strict=True)):
        side.report.formats[source.name] = form.name
        stream = read_examples(source, form, recipe.config, side.report, faults)
        while chunk := list(islice(stream, _CHUNK)):
            for index, rows in tokenize(chunk, recipe, side.report, faults):
                example, times = chunk[index].conversation, len(rows)
                collected += rows
                side.prompts += [example.prompt_digest()] * times
                side.digests += [example.digest()] * times
                side.weights += [source.weight] * times
                side.examples += [count + index] * times
                side.sources += [number] * times
            count += len(chunk)
    side.report.faulty, side.report.faults = faults.count, faults.shown
    long, policy = side.report.too_long, recipe.config.too_long
    reason = f"{long} are longer than {recipe.max_length} tokens (data.max_length) and data.too_long={policy}"
    faults.check(key, side.report.rows, len(collected), recipe.config.max_bad_fraction, reason if long else "")
    side.rows = TokenRows.of(collected)
    return side


def _encoded_chunk(
    encoder: LabelledEncoder | PairEncoder, chunk: list[Example], recipe: Recipe, report: SideReport, faults: Faults
) -> Iterator[tuple[int, list[Row]]]:
    """Place in the chunk and the row of each example whose label or answer can be learnt."""
    encoded = encoder.rows([example.conversation for example in chunk], [example.origin for example in chunk])
    for index, (row, is_long) in enumerate(encoded):
        report.too_long += is_long
        if isinstance(row, BadRow):
            faults.add(chunk[index].origin, str(row))
        else:
            yield index, [] if row is None else [row]


def _tokenize_chunk(
    masker: Masker, chunk: list[Example], recipe: Recipe, report: SideReport, faults: Faults
) -> Iterator[tuple[int, list[Row]]]:
    """Place in the chunk and rows of each example that can be learnt from."""
    rendered: list[Rendered] = []
    places: list[int] = []
    for index, example in enumerate(chunk):
        try:
            rendered.append(render(example.conversation, recipe.template, recipe.tokenizer))
            places.append(index)
        except BadRow as bad:
            faults.add(example.origin, str(bad))
    for index, encoded in zip(places, masker.encode(rendered), strict=True):
        origin = chunk[index].origin
        if encoded.row is None:
            faults.add(origin, encoded.fault)
            continue
        report.straddling += encoded.straddles
        report.too_long += len(encoded.row.input_ids) > recipe.max_length
        try:
            yield index, fit(encoded.row, recipe.max_length, recipe.config.too_long, origin)
        except BadRow as bad:
            faults.add(origin, str(bad))


def as_weighted(rows: TokenRows, indices: np.ndarray, weights: np.ndarray, seed: int) -> TokenRows:
    """The rows at `indices`, each as often as its weight says: its whole part, and once more with the odds of the rest.

    Args:
        rows: to choose from.
        indices: int64.
        weights: of each index.
        seed: of the draw.
    """
    draws = np.random.Generator(np.random.PCG64([seed, 1])).random(len(indices))
    whole = np.floor(weights)
    return take(rows, np.repeat(indices, (whole + (draws < weights - whole)).astype(np.int64)))


def take(rows: TokenRows, indices: np.ndarray) -> TokenRows:
    """The rows at `indices`, in that order."""
    return TokenRows.of([rows[int(i)] for i in indices])

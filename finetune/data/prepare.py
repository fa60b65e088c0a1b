"""From what the configuration names to rows that can be trained on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from finetune.data import cache
from finetune.data.config import DataConfig
from finetune.data.formats import Format
from finetune.data.labels import Labelling
from finetune.data.lengths import longest
from finetune.data.report import DataReport, SideReport
from finetune.data.rows import IGNORE, TokenRows
from finetune.data.samples import Sample, sample
from finetune.data.sources import PYDOCS, Source, recognise_all, resolve
from finetune.data.split import held_out
from finetune.data.templates import ChatTemplate, choose_template
from finetune.data.tokenizing import Recipe, Side, as_weighted, read_examples, take, tokenize_side
from finetune.data.validation import Faults
from finetune.errors import DataError

__all__ = ["DataReport", "Prepared", "Sample", "prepare"]

_SAMPLES = 32


@dataclass
class Prepared:
    """Data that is ready.

    Attributes:
        train: to learn from, one epoch; sources with weights are already repeated.
        eval: held out; may be empty where there are too few rows.
        template: the Jinja chat template that the rows were written with, to be saved with adapter and exports; None
            where the rows are plain text.
        prompts: held-out prompts with their answers, at most 32.
        report: what happened to the rows.
        packing: as configured.
    """

    train: TokenRows
    eval: TokenRows
    template: str | None
    prompts: list[Sample]
    report: DataReport
    packing: bool


@dataclass(frozen=True)
class _Plan:
    """Everything decided before the first row is tokenized."""

    config: DataConfig
    tokenizer: Any
    sources: list[Source]
    forms: list[Format]
    eval_sources: list[Source]
    eval_forms: list[Format]
    template: ChatTemplate | None
    max_length: int
    seed: int
    labelling: Labelling | None = None
    pairs: bool = False
    notes: list[str] = field(default_factory=list)

    def recipe(self) -> Recipe:
        """How rows are tokenized."""
        return Recipe(self.config, self.tokenizer, self.template, self.max_length, self.labelling, self.pairs)

    def digest(self) -> str:
        """Of all that the result depends on."""
        weighted = any(source.weight != 1 for source in self.sources)
        config = self.config
        parts = [
            [[source.digest() for source in side] for side in (self.sources, self.eval_sources)], config.eval is None,
            [form.name for form in self.forms + self.eval_forms], config.columns, config.template, config.too_long,
            config.max_bad_fraction, self.max_length, self.template.source if self.template else None,
            _tokenizer_digest(self.tokenizer), self.seed if weighted else None,
        ]  # fmt: skip
        if self.labelling is not None:
            parts.append(asdict(self.labelling))
        if self.pairs:
            parts.append("pairs")
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(
    data: DataConfig,
    tokenizer: Any,
    *,
    context: int,
    seed: int,
    labelling: Labelling | None = None,
    pairs: bool = False,
) -> Prepared:
    """Read, check, render, tokenize, label, hold out; from the cache where all that decides the result is unchanged.

    Args:
        data: what and how.
        tokenizer: a fast tokenizer of transformers; left unchanged.
        context: tokens the model can attend over.
        seed: of the draw where sources have weights that are no whole numbers; the held-out rows do not depend on it.
        labelling: how the label of a row is learnt; None where answers or texts are.
        pairs: whether an encoder reads what comes before the answer, and a decoder learns the answer.

    Raises:
        DataError: for a file that cannot be used, too many faulty rows, or nothing left to learn.
        ConfigError: for settings that conflict with the model or with one another.
    """
    if labelling is not None:
        context = min(context, tokenizer.model_max_length)  # RoBERTa counts its positions from two
    plan = _plan(data, tokenizer, longest(data.max_length, context), seed, labelling, pairs)
    directory, digest = cache.cache_directory(data.cache_dir), plan.digest()
    template = plan.template.source if plan.template else None
    found = cache.load(directory, digest)
    if found is not None:
        sides, values = found
        report = DataReport.from_dict(values["report"])
        report.cached = True
        prompts = [Sample(**item) for item in values["prompts"]]
        return Prepared(sides["train"], sides["eval"], template, prompts, report, data.packing)
    prepared = _make(plan, template)
    values = {"report": prepared.report.to_dict(), "prompts": [item.to_dict() for item in prepared.prompts]}
    problem = cache.store(directory, digest, {"train": prepared.train, "eval": prepared.eval}, values)
    if problem:
        prepared.report.notes.append(problem)
    return prepared


def _plan(
    data: DataConfig, tokenizer: Any, max_length: int, seed: int, labelling: Labelling | None, pairs: bool
) -> _Plan:
    sources = resolve(data.train, "data.train")
    if data.eval is not None:
        eval_sources = resolve(data.eval, "data.eval", side="eval")
    else:  # pydocs has a held-out half of its own, which the embedded base never saw
        eval_sources = [Source(PYDOCS, "data.eval", side="eval")] if any(source.is_pydocs for source in sources) else []
    forms, eval_forms = recognise_all(data, sources), recognise_all(data, eval_sources)
    kinds = {form.kind for form in forms + eval_forms}
    template = None if pairs else choose_template(data.chat_template, tokenizer, kinds)
    notes = []
    if tokenizer.eos_token_id is None and labelling is None:
        notes.append("the tokenizer has no end-of-text token: the model will not learn to stop")
    return _Plan(
        data, tokenizer, sources, forms, eval_sources, eval_forms, template, max_length, seed, labelling, pairs, notes
    )


def _make(plan: _Plan, template: str | None) -> Prepared:
    data = plan.config
    side = _tokenize("data.train", plan, plan.sources, plan.forms)
    own = _tokenize("data.eval", plan, plan.eval_sources, plan.eval_forms) if plan.eval_sources else None
    held = _held_out(side, plan) if data.eval is None else []
    learnt = np.setdiff1d(np.arange(len(side.rows)), held)
    train = as_weighted(side.rows, learnt, np.array(side.weights)[learnt], plan.seed)
    if not len(train):
        raise DataError("data.train: the weights leave no row to learn from: raise them")
    eval_rows = TokenRows.of([*(own.rows if own else ()), *take(side.rows, np.array(held, np.int64))])
    said = plan.template.said if plan.template else ""
    report = DataReport(
        side.report, own.report if own else None, said, plan.max_length, data.too_long,
        len(train), len(train.input_ids), int((train.labels != IGNORE).sum()),
        len(eval_rows), len(eval_rows.input_ids), int((eval_rows.labels != IGNORE).sum()),
        held_out=bool(held), notes=list(plan.notes),
    )  # fmt: skip
    if plan.labelling is not None and train.targets is not None:
        report.labels = plan.labelling.describe(train.targets)
    if own and data.eval is not None:
        report.shared = len(set(own.digests) & set(side.digests))
    if not len(eval_rows):
        report.notes.append("too few different rows to hold any out: nothing is evaluated")
    return Prepared(train, eval_rows, template, _samples(plan, side, own, held), report, data.packing)


def _tokenize(key: str, plan: _Plan, sources: list[Source], forms: list[Format]) -> Side:
    return tokenize_side(key, sources, forms, plan.recipe())


def _held_out(side: Side, plan: _Plan) -> list[int]:
    """Rows of `train` that are held out; those of pydocs never, it has its own."""
    candidates = [i for i, number in enumerate(side.sources) if not plan.sources[number].is_pydocs]
    chosen = held_out([side.prompts[i] for i in candidates], [side.digests[i] for i in candidates])
    return [candidates[i] for i in chosen]


def _samples(plan: _Plan, side: Side, own: Side | None, held: list[int]) -> list[Sample]:
    """Prompts of held-out examples, read a second time so that no side is ever held in memory as text."""
    encoder = plan.recipe().encoder()
    parts = [(plan.eval_sources, plan.eval_forms, own, list(range(len(own.rows))))] if own else []
    samples: list[Sample] = []
    for sources, forms, part, rows in [*parts, (plan.sources, plan.forms, side, held)]:
        chosen = _different_prompts(part, rows)[: _SAMPLES - len(samples)]
        if not chosen:
            continue
        examples = (
            example.conversation
            for source, form in zip(sources, forms, strict=True)
            for example in read_examples(source, form, plan.config, SideReport(), Faults())
        )
        wanted = set(chosen)
        found = {
            number: encoder.sample(conversation) if encoder else sample(conversation, plan.template, plan.tokenizer)
            for number, conversation in zip(range(max(wanted) + 1), examples, strict=False)
            if number in wanted
        }
        samples += [found[number] for number in chosen]
    return [item for item in samples if item.prompt_ids and len(item.prompt_ids) < plan.max_length]


def _different_prompts(side: Side, rows: list[int]) -> list[int]:
    """Numbers of the examples that the rows come from, one a prompt, by the prompts' digests."""
    first: dict[bytes, int] = {}
    for i in rows:
        first.setdefault(side.prompts[i], side.examples[i])
    return [first[prompt] for prompt in sorted(first)]


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of everything that decides tokens; not of padding and truncation, which every call may set anew."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}
    for state in ("padding", "truncation"):
        backend.pop(state, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([backend, special], sort_keys=True).encode()).hexdigest()

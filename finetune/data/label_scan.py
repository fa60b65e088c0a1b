"""Every label of the data, read before a model is loaded: which classes there are, and which rows cannot be learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from finetune.data.config import DataConfig
from finetune.data.conversation import BadRow
from finetune.data.labels import Labelling, is_number, label_of
from finetune.data.report import SideReport
from finetune.data.sources import Source, recognise_all, resolve
from finetune.data.tokenizing import read_examples
from finetune.data.validation import Faults
from finetune.errors import DataError

MOST_CLASSES = 1000
"""More different labels than this are no classes but texts or numbers."""
UNLABELLED = "-1"
"""What benchmarks write where they keep the label of a test row to themselves."""


def find_classes(config: DataConfig) -> tuple[str, ...]:
    """The different labels of `data.train`, numbers by their size before words in alphabetical order.

    Raises:
        DataError: when too many rows have none, all have the same, or the labels are no classes.
    """
    counts: Counter[str] = Counter()
    rows = 0
    for label in _labels(config, resolve(config.train, "data.train"), "data.train", _class):
        counts[label] += 1
        rows += 1
    numbers = [label for label in counts if is_number(label)]
    if any(not label.lstrip("-").isdecimal() for label in numbers) and len(numbers) == len(counts):
        example = next(label for label in numbers if not label.lstrip("-").isdecimal())
        raise DataError(
            f"data.train: its {len(counts)} different labels are numbers such as {example}, no classes:"
            " objective=regression learns numbers"
        )
    if len(counts) > MOST_CLASSES:
        raise DataError(
            f"data.train: {len(counts)} different labels in {rows} rows are no classes: expected at most"
            f" {MOST_CLASSES}; name the column of the class with data.columns={{label: ...}}"
        )
    if len(counts) < 2:
        only = next(iter(counts))
        raise DataError(f"data.train: all {rows} rows have the label {only!r}: a classification needs two or more")
    words = sorted(label for label in counts if label not in numbers)
    return (*sorted(numbers, key=float), *words)


def check_targets(config: DataConfig, labelling: Labelling) -> None:
    """Read every label of the held-out rows, and of the training rows where they are numbers.

    Raises:
        DataError: when too many are no number, or no class that is learnt.
    """

    def check(text: str) -> str:
        labelling.target(text)
        return text

    sides = {"data.train": config.train} if not labelling.names else {}
    if config.eval is not None:
        sides["data.eval"] = config.eval
    for key, value in sides.items():
        for _ in _labels(config, resolve(value, key), key, check):
            pass


def _labels(config: DataConfig, sources: list[Source], key: str, check: Callable[[str], str]) -> Iterator[str]:
    """The label of every row of a side that passes `check`; the others are faulty.

    Raises:
        DataError: at the end, when too many are.
    """
    report, faults, usable = SideReport(), Faults(), 0
    for source, form in zip(sources, recognise_all(config, sources), strict=True):
        for example in read_examples(source, form, config, report, faults):
            try:
                yield check(label_of(example.conversation))
                usable += 1
            except BadRow as bad:
                faults.add(example.origin, str(bad))
    faults.check(key, report.rows, usable, config.max_bad_fraction)


def _class(text: str) -> str:
    if text == UNLABELLED:
        raise BadRow("'label' is -1, which benchmarks write where a row has none")
    return text

"""The table of methods: its page is made of the results, rates are those chosen, and BLEU is BLEU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts")]
import methods_page  # noqa: E402
from methods import grid  # noqa: E402
from methods.bleu import bleu, words  # noqa: E402
from methods.tasks import TASKS  # noqa: E402

from finetune.adapters.base import ADAPTERS  # noqa: E402

HYPOTHESES = (
    "It is a guide to action which ensures that the military always obeys the commands of the party",
    "he read the book because he was interested in world history",
)
REFERENCES = (
    (
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ),
    ("he was interested in world history because he read the book",),
)


def test_the_page_is_made_of_the_results() -> None:
    text = methods_page.PAGE.read_text("utf-8")
    made = methods_page.page(text, methods_page.read_rows(), grid.methods())
    assert made == text, "run python scripts/methods_page.py"


def test_methods_learn_at_the_rates_that_were_chosen() -> None:
    rows = methods_page.read_rows()
    for name in ADAPTERS.types().keys() - grid.LEFT_OUT:
        chosen = grid.choose(name, rows)
        assert chosen is None or ADAPTERS.type_of(name)().learning_rate == chosen, name


def test_every_method_gets_the_same_search() -> None:
    names = grid.methods()
    assert set(names) | set(grid.LEFT_OUT) == {*ADAPTERS.types(), grid.PEFT}
    jobs = grid.searches("e2e", names)
    assert len({grid.key(job) for job in jobs}) == len(jobs) == 3 * len(names) * len(grid.SEARCH_SEEDS["e2e"])
    assert {job["steps"] for job in jobs} == {grid.SEARCHED["e2e"]}
    assert all(low < middle < high for low, middle, high in grid.RATES.values())


def row(rate: float, fall: float, task: str = "e2e", **more: object) -> dict:
    base = {"phase": "search", "task": task, "method": "lora", "quant": "nf4", "seed": 0, "steps": 1}
    return {**base, "learning_rate": rate, "dev_loss_first": 5.0, "dev_loss": 5.0 - fall, **more}


def test_a_rate_is_chosen_over_all_tasks_searched() -> None:
    low, middle, high = grid.rates("lora")
    e2e = [row(low, 1.0), row(middle, 2.0), row(high, 1.9)]
    assert grid.choose("lora", e2e) == middle
    assert grid.choose("lora", e2e[:2]) is None
    assert grid.choose("lora", [row(low, 1.0), row(middle, 1.96), row(high, 2.0)]) == middle, "one seed tells no more"
    assert grid.choose("lora", [row(low, 1.0), row(middle, 1.9), row(high, 2.0)]) == high
    sst2 = [
        row(rate, fall, "sst2", seed=seed) for seed in (0, 1) for rate, fall in ((low, 0), (middle, 0.1), (high, 0.4))
    ]
    assert grid.choose("lora", [*e2e, *sst2]) == high
    assert grid.choose("lora", [*e2e, *sst2[:-1]]) is None
    assert grid.choose("lora", [*e2e, *sst2[:-1], row(high, 0.0, "sst2", seed=1)]) == high, (
        "the mean still is the highest"
    )
    assert grid.choose("lora", [*e2e, *sst2[:-1], row(high, 0.4, "sst2", seed=1, diverged="not finite")]) == middle


def test_missing_rows_are_said_to_be_missing() -> None:
    low, middle, high = grid.rates("lora")
    found = [row(low, 1.0), row(middle, 2.0), row(high, 1.0)]
    measured = {"trainable": 1200, "peak_memory_bytes": 3e8, "cpu_seconds": 12.0, "bleu": 0.25}
    final = {"phase": "final", "steps": TASKS["e2e"].steps, **measured}
    text = methods_page.section([*found, row(middle, 3.0, **final)], ["lora", "ia3"])
    assert "| `lora` | 0.002 | 1,200 | 25.0 (2 missing) | missing | missing | 100% | 300 | 12 |" in text
    assert "| `ia3` | 0.04\\* | missing | missing |" in text, "a preset, and said to be no more than that"
    other = methods_page.section([*found, row(middle, 3.0, **final | {"steps": 1})], ["lora", "ia3"])
    assert "25.0" not in other, "a run of another length is no row of the table"
    assert "| `peft_lora` | missing | missing |" in methods_page.section(found, ["lora", "peft_lora"])


def test_bleu_against_known_values() -> None:
    """NLTK's documentation of corpus_bleu and sentence_bleu gives these, for the same sentences and case."""
    candidates = [text.split() for text in HYPOTHESES]
    references = [[text.split() for text in several] for several in REFERENCES]
    assert bleu(candidates, references) == pytest.approx(0.5920778868801042, abs=1e-12)
    assert bleu(candidates[:1], references[:1]) == pytest.approx(0.5045666840058485, abs=1e-12)
    assert bleu(candidates, [[candidate] for candidate in candidates]) == pytest.approx(1.0)
    assert bleu([["a", "b"]], [[["a", "b"]]]) == 0.0  # no four words in a row
    short = bleu([list("abcdefgh")], [[list("abcdefghij")]])
    assert short == pytest.approx(2.718281828459045 ** (1 - 10 / 8))
    assert words("Near Café Rouge, it's $5.") == ["near", "café", "rouge", ",", "it", "'", "s", "$", "5", "."]

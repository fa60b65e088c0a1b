"""The report: complete, escaped, and silent on the network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.pipeline import improvement
from finetune.report import tick_label, ticks, write_report
from finetune.samples import write_samples

HOSTILE = "<script>alert(1)</script>"
FETCHING = {"src", "href", "srcset", "data", "poster", "action", "background"}


class Page(HTMLParser):
    """Tags, attributes, texts, and whether every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(directory: Path, **record: Any) -> Path:
    steps = range(10, 60, 10)
    lines = [{"step": s, "loss": 4 - s / 100, "learning_rate": 2e-4 * s / 50, "grad_norm": 1.0} for s in steps]
    lines += [{"step": 25, "eval_loss": 3.9}, {"step": 50, "eval_loss": float("nan"), "tokens_per_second": 1234.0}]
    torn = '{"step": 60, "lo'
    (directory / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), torn]), "utf-8")
    base = {
        "format_version": 1, "name": "quick", "status": "finished", "first_eval": 4.0, "best_eval": 3.0, "steps": 50,
        "phases": {
            "load": {"seconds": 2.0, "peak_memory_bytes": 5e8},
            "train": {"seconds": 100, "peak_memory_bytes": 2e9},
        },
        "notes": ["AdamW instead of paged AdamW"], "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (directory / "run.json").write_text(json.dumps(base | record), "utf-8")
    (directory / "config.yaml").write_text(f"name: quick  # {HOSTILE}\n", "utf-8")
    write_samples(directory / "samples.md", [(f"Say {HOSTILE}", "ref", "a\n---\nb", "**After**")])
    for name, passed, reason in (("safetensors", True, ""), ("peft", False, f"because {HOSTILE}")):
        (directory / "export" / name).mkdir(parents=True)
        proof = {"format": name, "runtime": "x", "bytes": 12_340_000, "kl_mean": 1.5e-4, "retained": None, "rows": 1200,
                 "passed": passed, "reason": reason}  # fmt: skip
        (directory / "export" / name / "export.json").write_text(json.dumps(proof), "utf-8")
    return directory


def test_the_page_shows_the_run(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path))
    assert path == tmp_path / "report.html" and not list(tmp_path.glob(".tmp*"))
    page = Page(path.read_text("utf-8"))
    figures = ["finished", "4.00 → 3.00", "25.0%", "1.7 min", "2.00 GB", "1 of 2", "12.3", "0.00015", "1,200"]
    words = ["AdamW instead of paged AdamW", "versions.torch", "nats per token", "tokens per second", "optimizer step"]
    for text in figures + words:
        assert text in page.text, text
    assert page.tags.count("svg") == 4, "loss, learning rate, gradient norm and speed were measured; memory was not"
    assert page.tags.count("polyline") == 5
    assert "After" in page.text and "a\n---\nb" in page.text and "**After**" in page.text


def test_nothing_from_a_run_becomes_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    run = write_run(tmp_path, name=HOSTILE, notes=[HOSTILE], error=HOSTILE, device=HOSTILE)
    html = write_report(run).read_text("utf-8")
    page = Page(html)
    assert "script" not in page.tags and page.text.count(HOSTILE) >= 6
    assert not {name for name, _ in page.attributes} & FETCHING
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"https?://|url\(|@import", html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_an_empty_run_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "early", "status": "failed", "error": "DataError: no rows"}', "utf-8")
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert "DataError: no rows" in page.text and "svg" not in page.tags
    (tmp_path / "run.json").unlink()
    Page(write_report(tmp_path).read_text("utf-8"))


@pytest.mark.parametrize("lines", [['{"step": 1, "loss": 2.5}'], ['{"step": 1, "loss": 0}', '{"step": 2, "loss": 0}']])
def test_a_single_or_constant_value_can_be_drawn(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), "utf-8")
    html = write_report(tmp_path).read_text("utf-8")
    assert html.count("<polyline") == 1 and "nan" not in html


def test_ticks_are_round_and_around() -> None:
    assert ticks(0.3, 4.1) == [1, 2, 3, 4]
    assert ticks(0.3, 4.1, outer=True) == [0, 1, 2, 3, 4, 5]
    assert ticks(0, 2e-4, outer=True) == pytest.approx([0, 5e-5, 1e-4, 1.5e-4, 2e-4])
    assert ticks(7, 7) == [7]
    for low, high in ((-3.2, 9.9), (1e-9, 3e-9), (12345, 12346)):
        marks = ticks(low, high, outer=True)
        assert marks[0] <= low + 1e-12 and marks[-1] >= high - 1e-12 and 3 <= len(marks) <= 9


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([2.0, 2.5, 3.0], ["2.0", "2.5", "3.0"]),
        ([0, 1000, 2000], ["0", "1,000", "2,000"]),
        ([0, 5e-5, 1e-4], ["0", "0.5e-4", "1.0e-4"]),
        ([0.91, 0.92], ["0.91", "0.92"]),
    ],
)
def test_tick_labels_tell_neighbours_apart(values: list[float], labels: list[str]) -> None:
    assert [tick_label(value, values) for value in values] == labels


@pytest.mark.parametrize(
    ("last", "said"),
    [(1.5, "2.0000 -> 1.5000 nats a token (25.0% lower)"), (3.0, "2.0000 -> 3.0000 nats a token (50.0% higher: the")],
)
def test_the_last_line_says_which_way_the_loss_went(last: float, said: str) -> None:
    result = SimpleNamespace(first_eval=2.0, best_eval=last, first_metrics={}, best_metrics={})
    assert said in improvement(result, "nats a token")

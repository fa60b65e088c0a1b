"""Samples are greedy, leave the model as it was, and are written so that a person can read them."""

from __future__ import annotations

from pathlib import Path

from finetune.samples import write_samples


def test_written_samples_quote_every_answer(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples.md", [("two\nlines", "reference", "", "after")])
    text = (tmp_path / "samples.md").read_text("utf-8")
    assert "> two\n> lines" in text and "**Before**\n\n> (nothing)" in text and "> after" in text

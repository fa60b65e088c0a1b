"""The cache gives what was prepared before, and nothing else."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_rows import Write, questions, ready

from finetune.data import cache
from finetune.data.prepare import Prepared


def same(first: Prepared, second: Prepared) -> bool:
    arrays = all(
        np.array_equal(getattr(getattr(first, side), name), getattr(getattr(second, side), name))
        for side in ("train", "eval")
        for name in ("input_ids", "labels", "offsets")
    )
    reports = [{**item.report.to_dict(), "cached": None} for item in (first, second)]
    return arrays and first.prompts == second.prompts and first.template == second.template and reports[0] == reports[1]


def test_the_cache_gives_the_same_and_tokenizes_nothing(
    write: Write, plain_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(questions(50))
    first = ready(path, plain_tokenizer)
    from finetune.data import prepare as module

    monkeypatch.setattr(module, "tokenize_side", None)
    second = ready(path, plain_tokenizer, seed=5, packing=True)
    assert same(first, second) and second.report.cached and second.packing
    assert second.report.lines()[-1].endswith("from the cache")
    assert second.train.input_ids.dtype == np.int32 and second.train.offsets.dtype == np.int64


CHANGES: dict[str, dict[str, Any]] = {
    "template": {"chat_template": "chatml"},
    "length": {"max_length": 250},
    "policy": {"too_long": "drop"},
    "plain": {"template": "{prompt}:"},
    "fraction": {"max_bad_fraction": 0.5},
    "eval": {"eval": [{"prompt": "a", "completion": "b"}]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_rows_is_in_the_digest(change: str, write: Write, plain_tokenizer: Any) -> None:
    path = write(questions(50))
    ready(path, plain_tokenizer)
    assert not ready(path, plain_tokenizer, **CHANGES[change]).report.cached
    assert ready(path, plain_tokenizer).report.cached


def test_other_bytes_or_another_tokenizer_are_tokenized_anew(
    write: Write, plain_tokenizer: Any, bos_tokenizer: Any
) -> None:
    path = write(questions(50))
    ready(path, plain_tokenizer)
    assert not ready(path, bos_tokenizer).report.cached
    other_eos = deepcopy(plain_tokenizer)
    other_eos.eos_token = "<|im_end|>"
    assert not ready(path, other_eos).report.cached
    assert not ready(write(questions(51)), plain_tokenizer).report.cached
    plain_tokenizer(["a", "bb"], padding=True)
    assert ready(path, plain_tokenizer).report.cached


def test_weights_bring_the_seed_into_the_digest(write: Write, plain_tokenizer: Any) -> None:
    weights = {write(questions(50)): 0.5}
    ready(weights, plain_tokenizer, seed=0)
    assert not ready(weights, plain_tokenizer, seed=1).report.cached
    assert ready(weights, plain_tokenizer, seed=0).report.cached


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "garbage", "newer"])
def test_a_damaged_entry_is_made_anew(damage: str, write: Write, plain_tokenizer: Any, tmp_path: Path) -> None:
    path = write(questions(50))
    directory = tmp_path / "own"
    first = ready(path, plain_tokenizer, cache_dir=str(directory))
    (entry,) = directory.glob("*.safetensors")
    whole = entry.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    entry.write_bytes({
        "cut": whole[:-7], "flipped": bytes(flipped), "empty": b"", "garbage": b"\x80\x04]q\x00." * 50,
        "newer": whole.replace(b'format_version\\": 1', b'format_version\\": 9'),
    }[damage])  # fmt: skip
    assert entry.read_bytes() != whole
    again = ready(path, plain_tokenizer, cache_dir=str(directory))
    assert not again.report.cached and same(first, again)
    assert entry.read_bytes() == whole and [item.name for item in directory.iterdir()] == [entry.name]


def test_a_cache_that_cannot_be_written_is_a_note(write: Write, plain_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    data = ready(write(questions(20)), plain_tokenizer, cache_dir=str(tmp_path / "file"))
    assert any(line.startswith("data: tokenized rows are not cached in ") for line in data.report.lines())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "own"))
    assert cache.cache_directory("~/x") == Path.home() / "x"
    assert cache.cache_directory(None) == tmp_path / "own"
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_directory(None) == tmp_path / "xdg" / "finetune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_directory(None) == Path.home() / ".cache" / "finetune"

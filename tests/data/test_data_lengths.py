"""Rows that are too long, and which rows are held out."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.conversation import BadRow, Conversation, Turn
from finetune.data.lengths import fit, longest
from finetune.data.rows import IGNORE, Row
from finetune.data.split import held_out, held_out_count
from finetune.errors import ConfigError, DataError


def row(prompt: int, answer: int) -> Row:
    ids = np.arange(10, 10 + prompt + answer, dtype=np.int32)
    return Row(ids, np.where(np.arange(len(ids)) < prompt, IGNORE, ids).astype(np.int32))


def test_the_longest_row_is_the_context_or_2048() -> None:
    assert longest(None, 512) == 512
    assert longest(None, 100_000) == 2048
    assert longest(4096, 100_000) == 4096
    assert longest(512, 512) == 512
    with pytest.raises(ConfigError, match=r"data.max_length is 513, more than the model's context of 512 tokens"):
        longest(513, 512)


def test_a_row_that_fits_stays_as_it_is() -> None:
    whole = row(3, 5)
    assert fit(whole, 8, "error", "f:1") == [whole]


def test_truncate_keeps_the_beginning() -> None:
    (cut,) = fit(row(3, 7), 8, "truncate", "f:1")
    assert cut.input_ids.tolist() == list(range(10, 18))
    assert cut.labels.tolist() == [IGNORE] * 3 + list(range(13, 18))
    with pytest.raises(BadRow, match="nothing to learn within 8 tokens: its prompt is longer"):
        fit(row(8, 3), 8, "truncate", "f:1")


def test_truncate_leaves_no_prompt_dangling_at_the_end() -> None:
    both = row(2, 10)
    both.labels[5:9] = IGNORE
    (cut,) = fit(both, 8, "truncate", "f:1")
    assert len(cut.input_ids) == len(cut.labels) == 5


def test_drop_leaves_the_row_out_and_error_names_it() -> None:
    assert fit(row(3, 7), 8, "drop", "f:1") == []
    with pytest.raises(DataError, match=r"f:1: the row has 10 tokens and data.max_length is 8 \(data.too_long=error\)"):
        fit(row(3, 7), 8, "error", "f:1")


@given(prompt=st.integers(0, 30), answer=st.integers(1, 60), size=st.integers(2, 20))
def test_split_loses_no_token_that_can_be_learnt(prompt: int, answer: int, size: int) -> None:
    whole = row(prompt, answer)
    whole.labels[0] = IGNORE
    try:
        pieces = fit(whole, size, "split", "f:1")
    except BadRow:
        assert answer <= 1
        return
    learnt = [int(label) for piece in pieces for label in piece.labels if label != IGNORE]
    starts = {10 + start for start in range(0, prompt + answer, size)}
    expected = [int(label) for label in whole.labels if label != IGNORE and int(label) not in starts]
    if len(whole.input_ids) > size:
        assert learnt == expected, "only the first token of a piece, which nothing precedes, is not learnt"
        assert all(1 < len(piece.input_ids) <= size and piece.labels[0] == IGNORE for piece in pieces)


def digests(rows: list[str]) -> list[bytes]:
    return [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in rows]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (0, 0),
        (1, 0),
        (2, 1),
        (3, 1),
        (5, 1),
        (16, 4),
        (64, 16),
        (800, 16),
        (801, 16),
        (2000, 40),
        (30_000, 500),
        (10**6, 500),
    ],
)
def test_two_percent_are_held_out_between_16_and_500_but_never_more_than_a_quarter(rows: int, wanted: int) -> None:
    assert held_out_count(rows) == wanted or (rows in (2, 3) and held_out_count(rows) == rows // 2)
    keys = digests([str(i) for i in range(min(rows, 3000))])
    if rows <= 3000:
        assert len(held_out(keys, keys)) == held_out_count(rows)


@given(st.lists(st.sampled_from("abcdefghij"), max_size=60), st.randoms())
def test_duplicates_stay_together_whatever_the_order(texts: list[str], shuffler: random.Random) -> None:
    keys = digests(texts)
    chosen = {texts[i] for i in held_out(keys, keys)}
    assert len(held_out(keys, keys)) == sum(texts.count(text) for text in chosen)
    assert len(held_out(keys, keys)) < max(1, len(texts))
    shuffled = list(texts)
    shuffler.shuffle(shuffled)
    again = digests(shuffled)
    assert {shuffled[i] for i in held_out(again, again)} == chosen


def test_rows_with_one_prompt_are_split_by_their_answers() -> None:
    prompts, rows = digests(["the same"] * 100), digests([str(i) for i in range(100)])
    assert len(held_out(prompts, rows)) == 16
    assert held_out(digests(["a"] * 9), digests(["a"] * 9)) == []


def test_prompts_of_held_out_rows_are_never_learnt() -> None:
    prompts = [f"question {i // 8}" for i in range(800)]
    keys = digests(prompts)
    held = set(held_out(keys, digests([str(i) for i in range(800)])))
    assert len(held) == 16
    assert not {prompts[i] for i in held} & {prompts[i] for i in set(range(800)) - held}


def test_digests_tell_conversations_and_prompts_apart() -> None:
    def talk(question: str, answer: str) -> Conversation:
        return Conversation((Turn("user", question), Turn("assistant", answer, learn=True)))

    assert talk("a", "b").prompt_digest() == talk("a", "c").prompt_digest() != talk("x", "b").prompt_digest()
    assert talk("a", "b").digest() == talk("a", "b").digest() != talk("a", "c").digest()
    plain = Conversation((Turn("assistant", "t", learn=True),), plain=True)
    assert plain.prompt_digest() == plain.digest()
    assert len(plain.digest()) == 16

"""Labels: every token of an answer, its EOS, and nothing else, whatever the tokenizer does at the borders."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.conversation import Conversation, Turn
from finetune.data.masking import Encoded, Masker, show_mask
from finetune.data.offsets import OffsetTokenizer
from finetune.data.rows import IGNORE, Row
from finetune.data.templates import ChatTemplate, Rendered, choose_template, render
from finetune.errors import DataError


def encode(rendered: Rendered, tokenizer: Any) -> Encoded:
    (encoded,) = Masker(tokenizer).encode([rendered])
    return encoded


def row_of(conversation: Conversation, tokenizer: Any, template: str = "guanaco") -> Row:
    kinds = {"text"} if conversation.plain else {"chat"}
    encoded = encode(render(conversation, choose_template(template, tokenizer, kinds), tokenizer), tokenizer)
    assert encoded.row is not None, encoded.fault
    return encoded.row


def text_of(row: Row, tokenizer: Any, learnt: bool) -> str:
    return tokenizer.decode(row.input_ids[(row.labels != IGNORE) == learnt].tolist())


def qa(question: str, answer: str, plain: bool = True) -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer, learn=True)), plain=plain)


def test_an_answer_is_learnt_with_its_eos_and_nothing_else(plain_tokenizer: Any) -> None:
    row = row_of(qa("Q: who?\nA:", " the cat"), plain_tokenizer)
    assert text_of(row, plain_tokenizer, learnt=True) == " the cat<|end|>"
    assert text_of(row, plain_tokenizer, learnt=False) == "Q: who?\nA:"
    assert show_mask(row, plain_tokenizer) == "Q: who?\nA:[[ the cat<|end|>]]"


def test_every_answer_of_a_chat_is_learnt_with_its_own_eos(tokenizer: Any) -> None:
    turns = [Turn("user", "a cat"), Turn("assistant", "the mat", learn=True)] * 3
    row = row_of(Conversation(tuple(turns)), tokenizer)
    learnt_eos = int(((row.labels != IGNORE) & (row.input_ids == tokenizer.eos_token_id)).sum())
    assert learnt_eos == 3 == int((row.input_ids == tokenizer.eos_token_id).sum())
    assert row.labels[-1] == tokenizer.eos_token_id


def test_the_eos_is_learnt_where_the_template_writes_none(tokenizer: Any) -> None:
    bare = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "test")
    row = encode(render(qa("a", "cat", plain=False), bare, tokenizer), tokenizer).row
    assert row is not None and row.labels[-1] == row.input_ids[-1] == tokenizer.eos_token_id
    assert (row.input_ids == tokenizer.eos_token_id).sum() == 1


def test_the_eos_is_learnt_where_it_stands_behind_the_generation_marks(tokenizer: Any) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ eos_token }}\n{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    turns = tuple([Turn("user", "a"), Turn("assistant", "cat", learn=True)] * 2)
    row = encode(render(Conversation(turns), ChatTemplate(source, "test"), tokenizer), tokenizer).row
    assert row is not None
    is_eos = row.input_ids == tokenizer.eos_token_id
    assert is_eos.sum() == 2 and (row.labels[is_eos] != IGNORE).all() and is_eos[-1]


def test_what_stands_between_the_last_answer_and_its_eos_is_learnt_too(plain_tokenizer: Any) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '\n\n' + eos_token }}{% endif %}{% endfor %}"
    )
    row = encode(
        render(qa("Q:", "cat", plain=False), ChatTemplate(source, "test"), plain_tokenizer), plain_tokenizer
    ).row
    assert row is not None and show_mask(row, plain_tokenizer) == "Q:[[cat\n\n<|end|>]]"


def test_a_text_is_learnt_whole_but_for_its_first_token_and_ends_with_one_eos(tokenizer: Any) -> None:
    text = Conversation((Turn("assistant", "the cat sat", learn=True),), plain=True)
    row = row_of(text, tokenizer)
    assert row.labels[0] == IGNORE and (row.labels[1:] == row.input_ids[1:]).all()
    assert row.input_ids[-1] == tokenizer.eos_token_id
    ended = Conversation((Turn("assistant", "the cat sat<|end|>", learn=True),), plain=True)
    np.testing.assert_array_equal(row_of(ended, tokenizer).input_ids, row.input_ids)


def test_bos_never_stands_twice(bos_tokenizer: Any) -> None:
    start = bos_tokenizer.bos_token_id
    for conversation in (qa("<|start|>Q:", " a"), qa("Q:", " a"), qa("Q", "a", plain=False)):
        row = row_of(conversation, bos_tokenizer)
        assert row.input_ids[0] == start and (row.input_ids == start).sum() == 1
    own = ChatTemplate("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", "test")
    row = encode(render(qa("Q", "a", plain=False), own, bos_tokenizer), bos_tokenizer).row
    assert row is not None and (row.input_ids == start).sum() == 1


def test_a_tokenizer_that_ends_every_text_gets_no_second_eos() -> None:
    from data_tokenizers import byte_level
    from tokenizers import processors

    tokenizer = byte_level()
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[end]
    )
    row = row_of(qa("Q:", " a"), tokenizer)
    assert (row.input_ids == tokenizer.eos_token_id).sum() == 1 and row.labels[-1] == tokenizer.eos_token_id


def test_without_an_eos_a_row_ends_with_its_answer(plain_tokenizer: Any) -> None:
    tokenizer = deepcopy(plain_tokenizer)
    tokenizer.eos_token = None
    assert text_of(row_of(qa("Q:", "the cat", plain=False), tokenizer), tokenizer, learnt=True) == " the cat"


def test_padding_that_is_eos_leaves_eos_learnt() -> None:
    from data_tokenizers import byte_level

    from finetune.data.batching import collate
    from finetune.data.rows import TokenRows

    tokenizer = byte_level(pad_is_eos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = TokenRows.of([row_of(qa("Q:", " a"), tokenizer), row_of(qa("Q: who", " the cat sat on it"), tokenizer)])
    batch = collate(rows, [[0], [1]], tokenizer.pad_token_id)
    for b, row in enumerate(rows):
        assert batch.labels_BS[b, len(row.labels) - 1] == tokenizer.eos_token_id
        assert (batch.labels_BS[b, len(row.labels) :] == IGNORE).all()


def test_the_prompts_tokens_need_not_be_a_prefix_of_the_wholes() -> None:
    from data_tokenizers import space_at_end

    tokenizer = space_at_end()
    prompt, whole = "who:", "who: the cat"
    ids = tokenizer(whole)["input_ids"]
    assert tokenizer(prompt)["input_ids"] != ids[: len(tokenizer(prompt)["input_ids"])]
    encoded = encode(render(qa(prompt, " the cat"), None, tokenizer), tokenizer)
    assert encoded.row is not None and encoded.straddles
    assert show_mask(encoded.row, tokenizer) == "<|start|> who[[: the cat<|end|>]]"
    encoded = encode(render(qa("who: ", "the cat"), None, tokenizer), tokenizer)
    assert encoded.row is not None and not encoded.straddles
    assert show_mask(encoded.row, tokenizer) == "<|start|> who: [[the cat<|end|>]]"


def test_the_real_tokenizer_whose_prompt_is_no_prefix(stories_tokenizer: Any) -> None:
    prompt, answer = "One day there", " was a girl."
    whole = stories_tokenizer(prompt + answer)["input_ids"]
    alone = stories_tokenizer(prompt)["input_ids"]
    assert whole[: len(alone)] != alone
    encoded = encode(render(qa(prompt, answer), None, stories_tokenizer), stories_tokenizer)
    assert encoded.row is not None and encoded.straddles
    assert show_mask(encoded.row, stories_tokenizer) == "<|start_story|> One day [[there was a girl.<|end_story|>]]"


def test_characters_that_the_tokenizer_passes_over_do_not_move_the_mask(stories_tokenizer: Any) -> None:
    for question in ("née", "café café café", "🙂🙂🙂🙂🙂🙂", "中文中文"):
        row = row_of(qa(f"She said {question}. ", "the end"), stories_tokenizer)
        assert text_of(row, stories_tokenizer, learnt=True) == "the end<|end_story|>", question


def test_white_space_in_an_answer_is_learnt_also_where_offsets_are_trimmed() -> None:
    from data_tokenizers import byte_level

    answer = "if x:\n        return   x"
    for trim in (False, True):
        tokenizer = byte_level(trim_offsets=trim)
        row = row_of(qa("Q:\n", answer), tokenizer)
        assert text_of(row, tokenizer, learnt=True) == answer + "<|end|>"


def test_nothing_left_to_learn_is_a_faulty_row(stories_tokenizer: Any) -> None:
    encoded = encode(render(qa("She said: ", "中文"), None, stories_tokenizer), stories_tokenizer)
    assert encoded.row is None and encoded.fault == "nothing to learn: no token of its answers is left"


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"the tokenizer \(Slow\) gives no character offsets.*tokenizer\.json"):
        OffsetTokenizer(Slow())


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: "<|" not in text
)
WORDS = st.text(st.sampled_from("the cat sat:\n\t é🙂中.,!x "), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.one_of(TEXT, WORDS), answer=st.one_of(TEXT, WORDS).filter(str.strip))
def test_byte_level_masks_cover_exactly_the_answer(tokenizer: Any, prompt: str, answer: str) -> None:
    """Oracle: decoding. What is learnt contains the answer, and exceeds it by at most the token at its border."""
    encoded = encode(render(qa(prompt, answer), None, tokenizer), tokenizer)
    if encoded.row is None:
        assert tokenizer.unk_token is not None, "only a tokenizer that passes characters over finds nothing to learn"
        return
    row = encoded.row
    learnt = np.flatnonzero(row.labels != IGNORE)
    assert learnt[-1] == len(row.input_ids) - 1 and row.input_ids[-1] == tokenizer.eos_token_id
    assert (np.diff(learnt) == 1).all(), "one answer is one run of tokens"
    assert learnt[0] >= 1
    if tokenizer.unk_token is not None:
        return  # passes characters over: decoding is no oracle
    said = tokenizer.decode(row.input_ids[learnt[:-1]].tolist())
    before = tokenizer.decode(row.input_ids[: learnt[0]].tolist(), skip_special_tokens=True)
    if learnt[0] > 1 or tokenizer.bos_token_id is not None:  # else the very first token is part of the answer
        assert answer in said or "\ufffd" in said
    assert len(before) <= len(prompt) or "\ufffd" in before or learnt[0] == 1


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(WORDS.filter(lambda text: bool(text.strip())), min_size=2, max_size=6))
def test_masks_of_chats_follow_the_characters(tokenizer: Any, texts: list[str]) -> None:
    """Oracle: character by character. A token is learnt exactly if one of its characters is."""
    texts = texts[: len(texts) // 2 * 2]
    turns = tuple(Turn("assistant" if i % 2 else "user", text, learn=bool(i % 2)) for i, text in enumerate(texts))
    rendered = render(Conversation(turns), choose_template("guanaco", tokenizer, {"chat"}), tokenizer)
    row = encode(rendered, tokenizer).row
    assert row is not None
    characters = {place for start, end in rendered.spans for place in range(start, end)}
    (tokens,) = OffsetTokenizer(tokenizer)([rendered.text], add_special_tokens=False)
    np.testing.assert_array_equal(row.input_ids, tokens.ids[: len(row.input_ids)])
    for i, (start, end) in enumerate(zip(tokens.starts, tokens.ends, strict=True)):
        expected = i > 0 and any(place in characters for place in range(start, end))
        assert (row.labels[i] != IGNORE) == expected
    if tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.unk_token is None:
        return  # the kind that trims white space from offsets
    covered = {place for start, end in zip(tokens.starts, tokens.ends, strict=True) for place in range(start, end)}
    passed_over = set(range(len(rendered.text))) - covered
    kept = OffsetTokenizer(tokenizer)._kept(rendered.text)
    assert not passed_over & set(range(len(rendered.text)) if kept is None else kept.tolist()), (
        "every character the tokenizer keeps belongs to a token"
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(TEXT, WORDS))
def test_repaired_offsets_are_in_order_and_inside_the_text(tokenizer: Any, text: str) -> None:
    (tokens,) = OffsetTokenizer(tokenizer)([text], add_special_tokens=True)
    assert tokens.ids.tolist() == tokenizer(text)["input_ids"]
    real = tokens.ends > tokens.starts
    assert (np.diff(tokens.starts[real]) >= 0).all() and (tokens.ends <= len(text)).all() and (tokens.starts >= 0).all()

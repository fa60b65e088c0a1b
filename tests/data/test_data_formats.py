"""Formats: recognised, converted, renamed, templated; and every faulty row in its own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.config import FORMATS as NAMES
from finetune.data.config import DataConfig
from finetune.data.conversation import BadRow, Conversation, Turn
from finetune.data.files import RawRow
from finetune.data.formats import FORMATS, recognise
from finetune.data.validation import Faults, check_turns
from finetune.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def raw(*rows: Any) -> list[RawRow]:
    return [RawRow(f"f:{i}", row) for i, row in enumerate(rows, 1)]


def convert(row: dict[str, Any], **settings: Any) -> list[Conversation]:
    from finetune.data.columns import rename

    config = DataConfig(**settings)
    form = recognise(config, "f", raw(row))
    return form.convert(rename(row, config.columns))


def spoken(conversation: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in conversation.turns]


def test_the_config_names_exactly_the_registered_formats() -> None:
    assert set(NAMES) == {"auto", *FORMATS}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": "t"}, "text"),
        ({"text": "t", "label": 1}, "text"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca"),
        ({"instruction": "i", "output": "o", "text": "all of it"}, "alpaca"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"prompt": "p", "completion": ["c", "d"]}, "prompt_completion"),
        ({"messages": CHAT}, "messages"),
        ({"conversations": CHAT}, "messages"),
        ({"conversations": SHARE, "tools": "[]"}, "sharegpt"),
        ({"messages": SHARE}, "sharegpt"),
    ],
)
def test_a_format_is_recognised_by_its_columns(row: dict[str, Any], name: str) -> None:
    assert recognise(DataConfig(), "f", raw(row)).name == name


def test_most_of_the_first_rows_decide() -> None:
    odd = {"text": "t"}
    assert recognise(DataConfig(), "f", raw(odd, {"messages": CHAT}, {"messages": CHAT})).name == "messages"
    assert recognise(DataConfig(), "f", [RawRow("f:1", None, "is not JSON"), *raw(odd)]).name == "text"


def test_conversations_of_each_format() -> None:
    assert spoken(convert({"text": "t"})[0]) == [("assistant", "t")]
    alpaca = convert({"instruction": "i", "input": "x", "output": "o", "system": "s"})[0]
    assert alpaca.turns == (Turn("system", "s"), Turn("user", "i", context="x"), Turn("assistant", "o", learn=True))
    assert spoken(convert({"prompt": "p", "completion": "c"})[0]) == [("user", "p"), ("assistant", "c")]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, CHAT[1]]
    assert spoken(convert({"messages": parts})[0]) == [("user", "ab"), ("assistant", "a")]


def test_only_answers_are_learnt_and_a_weight_of_0_is_not() -> None:
    turns = [*CHAT, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "bad", "weight": 0}, *CHAT]
    learnt = [turn.learn for turn in convert({"messages": turns})[0].turns]
    assert learnt == [False, True, False, False, False, True]


def test_sharegpt_with_tools_function_call_and_observation() -> None:
    tool = {"name": "search", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call = {"name": "search", "arguments": {"q": "cat"}}
    turns = [
        {"from": "human", "value": "find"}, {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "[1]"}, {"from": "gpt", "value": "found"},
    ]  # fmt: skip
    (conversation,) = convert({"conversations": turns, "system": "be kind", "tools": json.dumps([tool])})
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.turns[2] == Turn("assistant", "", learn=True, calls=(call,))
    assert conversation.tools == ({"type": "function", "function": tool},)
    assert check_turns(conversation) == conversation
    turns[1]["value"] = "search(cat)"
    assert convert({"conversations": turns})[0].turns[1] == Turn("assistant", "search(cat)", learn=True)


def test_openai_tool_calls_without_content() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        CHAT[1],
    ]
    (conversation,) = convert({"messages": turns})
    assert conversation.turns[1].calls == ({"name": "f", "arguments": {"x": 1}},)
    assert check_turns(conversation) == conversation


def test_columns_rename_and_a_list_of_answers_gives_several_rows() -> None:
    row = {"mr": "name[X]", "refs": ["one", "two"]}
    found = convert(row, columns={"prompt": "mr", "completion": "refs"})
    assert [spoken(item) for item in found] == [
        [("user", "name[X]"), ("assistant", answer)] for answer in ("one", "two")
    ]
    assert not found[0].plain
    numbers = convert({"q": "2+2", "a": 4}, columns={"prompt": "q", "completion": "a"})
    assert numbers[0].turns[1].text == "4"


def test_a_template_writes_the_prompt_as_plain_text() -> None:
    row = {"question": "who?", "sql": "SELECT {x}", "n": 3}
    (found,) = convert(row, template="{{Q{n}}}: {question}\nA: ", columns={"completion": "sql"})
    assert found.plain and spoken(found) == [("user", "{Q3}: who?\nA: "), ("assistant", "SELECT {x}")]
    (whole,) = convert(row, template="{question} {sql}", format="text")
    assert whole.plain and spoken(whole) == [("assistant", "who? SELECT {x}")]


def test_a_template_reaches_columns_and_nothing_behind_them() -> None:
    row = {"prompt.__class__": "a column", "prompt": "p", "completion": "c"}
    (found,) = convert(row, template="{prompt.__class__} ")
    assert found.turns[0].text == "a column "
    with pytest.raises(DataError, match=r"has no 'completion.__class__': it has prompt, completion"):
        convert({"prompt": "p", "completion": "c"}, template="{completion.__class__}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": "no column"}, "it names no column"),
        ({"template": "{x!r}"}, "expected {column} without '!' and ':'"),
        ({"template": "{x:>10}"}, "expected {column} without '!' and ':'"),
        ({"template": "{}"}, "expected {column}"),
        ({"template": "{x"}, "write {{ and }} for braces of the text"),
        ({"template": "{x}", "format": "messages"}, "data.template conflicts with data.format=messages"),
        ({"columns": {"promt": "q"}}, "names the field 'promt'.*did you mean 'prompt'"),
        ({"columns": {"question": "prompt"}}, "names the field 'question'.*write {prompt: question}"),
        ({"format": "alpacca"}, "data.format is 'alpacca'.*did you mean 'alpaca'"),
        ({"too_long": "cut"}, "data.too_long is 'cut': expected truncate | drop | split | error"),
        ({"max_length": 1}, "data.max_length is 1: expected at least 2"),
        ({"max_bad_fraction": 1.5}, "expected a share between 0 and 1"),
        ({"train": []}, "data.train is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("{", r"\{")):
        DataConfig(**settings)


def test_no_format_recognised_says_what_was_seen_and_what_to_do() -> None:
    row = {"id": "seed_0", "instruction": "i", "instances": [{"input": "", "output": "o"}], "is_classification": False}
    with pytest.raises(DataError) as caught:
        recognise(DataConfig(), "seed.jsonl", raw(row))
    assert str(caught.value) == (
        "seed.jsonl: no format recognised: its rows have id, instruction, instances (a list, its first item an object "
        "(input, output)), is_classification (true or false); expected messages {messages: [{role, content}]}; "
        "sharegpt {conversations: [{from, value}]}; alpaca {instruction, input, output}; "
        "prompt_completion {prompt, completion}; text {text}; "
        "name the columns with data.columns={prompt: ..., completion: ...} or write a data.template"
    )


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"q": "a", "a": "b"}, {"columns": {"prompt": "question"}}, "has no 'question': it has q, a"),
        ({"question": "a"}, {"columns": {"prompt": "qestion"}}, "did you mean 'question'"),
        (
            {"q": "a", "a": "b"},
            {"format": "alpaca"},
            "data.format=alpaca needs instruction, input, output: the first row has no",
        ),
        ({"q": "a", "a": "b"}, {"template": "{q}"}, "completion: the first row has no 'completion'.*data.columns="),
        ({"q": "a", "a": "b"}, {"template": "{qq}", "columns": {"completion": "a"}}, "has no 'qq'.*did you mean 'q'"),
    ],
)
def test_a_setting_that_fits_no_row_is_a_fault_of_the_file(row: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        recognise(DataConfig(**settings), "f", raw(row))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no usable row: it holds no rows"),
        (raw([1, 2]), "no usable row: f:1 is a list, its first item a number; expected rows that are JSON objects"),
        ([RawRow("f:1", None, "is not JSON: x")], "no usable row: f:1 is not JSON: x"),
    ],
)
def test_nothing_usable_is_a_fault_of_the_file(rows: list[RawRow], words: str) -> None:
    with pytest.raises(DataError, match=words):
        recognise(DataConfig(), "f", rows)


BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"txt": "a"}, "has no 'text': it has txt; did you mean 'txt'"),
    ("text", {"text": None}, "'text' is null: expected a text"),
    ("text", {"text": " \n"}, "the text is empty"),
    ("alpaca", {"instruction": "i"}, "has no 'output'"),
    ("alpaca", {"instruction": "i", "output": ""}, r"the answer is empty \(turn 2\)"),
    ("prompt_completion", {"prompt": "p", "completion": []}, "'completion' is an empty list"),
    ("prompt_completion", {"prompt": "p", "completion": [["x"]]}, "expected a text"),
    ("prompt_completion", {"prompt": "p", "completion": {"a": 1}}, r"'completion' is an object \(a\): expected a text"),
    ("messages", {"messages": []}, "'messages' is an empty list: expected a list of turns"),
    ("messages", {"messages": "hi"}, "'messages' is a text: expected a list of turns"),
    ("messages", {"messages": [{"role": "usr", "content": "q"}]}, "turn 1 has the role 'usr'.*did you mean 'user'"),
    ("messages", {"messages": [{"role": ["user"], "content": "q"}]}, r"turn 1 has the role \['user'\]"),
    ("messages", {"messages": [CHAT[0]]}, "nothing to learn: it has no answer"),
    ("messages", {"messages": [CHAT[1], CHAT[0]]}, "roles out of order: turn 1 is assistant at the beginning"),
    ("messages", {"messages": [CHAT[0], CHAT[0], CHAT[1]]}, "roles out of order: turn 2 is user after user"),
    ("messages", {"messages": [*CHAT, CHAT[1]]}, "roles out of order: turn 3 is assistant after assistant"),
    (
        "messages",
        {"messages": [*CHAT, {"role": "system", "content": "s"}]},
        "roles out of order: turn 3 is system after",
    ),
    ("messages", {"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, r"the answer is empty \(turn 2\)"),
    ("messages", {"messages": [CHAT[0], {"role": "assistant"}]}, "has no 'content': it has role"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
    ("messages", {"messages": CHAT, "tools": "no json"}, "'tools' is a text: expected a list of JSON schemas"),
    ("messages", {"messages": [CHAT[0], {"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
    ("messages", {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{}]}]}, "a tool call without a name"),
    ("messages", {"messages": [{**CHAT[1], "tool_calls": 1}]}, "message 1: 'tool_calls' is a number: expected a list"),
    ("sharegpt", {"conversations": [{"from": "gtp", "value": "a"}]}, "turn 1 has the role 'gtp'.*did you mean 'gpt'"),
    ("sharegpt", {"conversations": [SHARE[1]]}, "roles out of order: turn 1 is assistant at the beginning"),
]


@pytest.mark.parametrize(("name", "row", "words"), BAD_ROWS)
def test_a_faulty_row_says_why(name: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow, match=words):
        for conversation in FORMATS[name].convert(row):
            check_turns(conversation)


def test_turns_after_the_last_answer_are_left_out() -> None:
    (conversation,) = convert({"messages": [*CHAT, CHAT[0]]})
    assert spoken(check_turns(conversation)) == [("user", "q"), ("assistant", "a")]


def test_faults_are_counted_tolerated_up_to_a_share_and_refused_beyond() -> None:
    faults = Faults()
    for i in range(10):
        faults.add(f"f:{i}", f"reason {i}")
    faults.check("data.train", rows=1000, usable=990, max_bad_fraction=0.01)
    with pytest.raises(DataError) as caught:
        faults.check("data.train", rows=999, usable=989, max_bad_fraction=0.01)
    assert str(caught.value) == (
        "data.train: 10 of 999 rows are faulty (1 %, data.max_bad_fraction=0.01 allows 1 %): f:0: reason 0; "
        "f:1: reason 1; f:2: reason 2; f:3: reason 3; f:4: reason 4"
    )
    with pytest.raises(DataError, match="none of 10 rows can be used: f:0: reason 0"):
        faults.check("data.train", rows=10, usable=0, max_bad_fraction=1.0)


@pytest.mark.parametrize(
    ("file", "settings", "name"),
    [
        ("instruct/alpaca_2k.jsonl", {}, "alpaca"),
        ("chat/sgd_train_600.jsonl", {}, "messages"),
        ("chat/glaive_toolcall_300.jsonl", {}, "sharegpt"),
        ("lm/tinystories_train.jsonl", {}, "text"),
        ("sql/wikisql_dev.jsonl", {"columns": {"prompt": "question", "completion": "sql"}}, "prompt_completion"),
        ("nlg/e2e_dev.jsonl", {"columns": {"prompt": "mr", "completion": "refs"}}, "prompt_completion"),
    ],
)
def test_all_rows_of_real_files_convert(file: str, settings: dict[str, Any], name: str, shared_data: Path) -> None:
    from finetune.data.columns import rename
    from finetune.data.files import read_file

    rows = list(read_file(shared_data / file))
    config = DataConfig(**settings)
    form = recognise(config, file, rows[:20])
    assert form.name == name
    found = [check_turns(item) for row in rows for item in form.convert(rename(row.value, config.columns))]
    assert len(found) == (4672 if "e2e" in file else len(rows))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.sampled_from(["", "a", '{"name": "f"}'])
)
KEYS = st.sampled_from(["type", "text", "function", "name", "arguments"])
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=6)
SPEAKERS = st.sampled_from(["user", "assistant", "tool", "human", "gpt", "function_call", "observation"])
TURN = st.fixed_dictionaries(
    {}, optional={"role": SPEAKERS | JSON, "from": SPEAKERS | JSON, "content": JSON, "value": JSON, "tool_calls": JSON}
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        **{
            name: JSON for name in ("text", "instruction", "input", "output", "system", "prompt", "completion", "tools")
        },
        **{name: st.lists(TURN, max_size=3) | JSON for name in ("messages", "conversations")},
    },
)


@settings(max_examples=200, deadline=None)
@given(row=ROW, name=st.sampled_from(list(FORMATS)))
def test_whatever_a_row_holds_it_converts_or_is_faulty(row: dict[str, Any], name: str) -> None:
    FORMATS[name].fits(row)
    try:
        conversations = [check_turns(item) for item in FORMATS[name].convert(row)]
    except BadRow as bad:
        assert str(bad) and "\n" not in str(bad)
        return
    assert conversations and all(any(turn.learn for turn in item.turns) for item in conversations)
    assert all(len(item.digest()) == len(item.prompt_digest()) == 16 for item in conversations)

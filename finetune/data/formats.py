"""The formats of rows: how each is recognised and what conversation a row of it is.

text                 {text}
alpaca               {instruction, input?, output, system?}            Stanford Alpaca
prompt_completion    {prompt, completion, system?}
messages             {messages: [{role, content, tool_calls?}], tools?}    OpenAI; `content` a text or typed parts
sharegpt             {conversations: [{from, value}], system?, tools?}     ShareGPT, with function_call and observation
labelled             {label, text, text_pair?}    for classification and regression; GLUE's names of the texts as well
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.columns import as_text, describe, fill, lacks, rename, template_fields
from finetune.data.config import DataConfig
from finetune.data.conversation import BadRow, Conversation, Turn
from finetune.data.files import RawRow
from finetune.errors import DataError, nearest

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        name: as in `data.format`.
        kind: "text", "instruction" or "chat"; decides the chat template where none is named.
        shape: its fields, in words.
        fits: whether a row looks like it.
        convert: a row's conversations; several where the answer is a list. Raises BadRow.
    """

    name: str
    kind: str
    shape: str
    fits: Callable[[Row], bool]
    convert: Callable[[Row], list[Conversation]]


def _text(row: Row) -> list[Conversation]:
    text = as_text(row, "text")
    return [Conversation((Turn("assistant", text, learn=True),), plain=True)]


def _answers(row: Row, name: str) -> list[str]:
    """The answer, or each of them where the column holds a list."""
    value = row.get(name)
    if isinstance(value, (list, tuple)):
        if not value:
            raise BadRow(f"{name!r} is an empty list: expected an answer")
        return [as_text({name: item}, name) for item in value]
    return [as_text(row, name)]


def _optional(row: Row, name: str) -> str:
    return "" if row.get(name) is None else as_text(row, name)


def _system(row: Row) -> tuple[Turn, ...]:
    text = _optional(row, "system")
    return (Turn("system", text),) if text else ()


def _alpaca(row: Row) -> list[Conversation]:
    question = Turn("user", as_text(row, "instruction"), context=_optional(row, "input"))
    start = (*_system(row), question)
    return [Conversation((*start, Turn("assistant", text, learn=True))) for text in _answers(row, "output")]


def _prompt_completion(row: Row) -> list[Conversation]:
    start = (*_system(row), Turn("user", as_text(row, "prompt")))
    return [Conversation((*start, Turn("assistant", text, learn=True))) for text in _answers(row, "completion")]


def _content(message: Row, number: int) -> str:
    """A message's text: a string, or the texts of typed parts."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, (list, tuple)):
        return as_text(message, "content")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else describe(part)
            raise BadRow(f"message {number} has a part of type {kind!r}: only parts of type 'text' can be learnt")
        texts.append(as_text(part, "text"))
    return "".join(texts)


def _calls(message: Row, number: int) -> tuple[dict[str, Any], ...]:
    calls = []
    given = message.get("tool_calls") or []
    if not isinstance(given, (list, tuple)):
        raise BadRow(f"message {number}: 'tool_calls' is {describe(given)}: expected a list")
    for call in given:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"message {number} has a tool call without a name")
        arguments = function.get("arguments", {})
        calls.append(
            {"name": function["name"], "arguments": _loads(arguments) if isinstance(arguments, str) else arguments}
        )
    return tuple(calls)


_MESSAGE_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip


def _messages(row: Row) -> list[Conversation]:
    turns = []
    for number, message in enumerate(_turn_list(row, "messages", "conversations"), 1):
        role = _role(message.get("role"), _MESSAGE_ROLES, number)
        learn = role == "assistant" and message.get("weight", 1) != 0
        turns.append(Turn(role, _content(message, number), learn, calls=_calls(message, number)))
    return [Conversation((*_system(row), *turns), tools=_tools(row))]


_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip


def _sharegpt(row: Row) -> list[Conversation]:
    turns = []
    for number, message in enumerate(_turn_list(row, "conversations", "messages"), 1):
        role = _role(message.get("from"), _SHAREGPT_ROLES, number)
        text = as_text(message, "value")
        calls = _calls_in(text) if message.get("from") == "function_call" else ()
        turns.append(Turn(role, "" if calls else text, learn=role == "assistant", calls=calls))
    return [Conversation((*_system(row), *turns), tools=_tools(row))]


def _calls_in(text: str) -> tuple[dict[str, Any], ...]:
    """The tool calls that the text of a `function_call` turn spells; none where it is not such JSON."""
    value = _loads(text)
    calls = value if isinstance(value, list) else [value]
    if all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return tuple({"name": call["name"], "arguments": call.get("arguments", {})} for call in calls)
    return ()


def _turn_list(row: Row, *names: str) -> Sequence[Row]:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise BadRow(lacks(names[0], row))
    turns = row[name]
    if not isinstance(turns, (list, tuple)) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow(f"{name!r} is {describe(turns)}: expected a list of turns")
    return turns


def _role(role: Any, roles: Mapping[str, str], number: int) -> str:
    if not isinstance(role, str) or role not in roles:
        raise BadRow(f"turn {number} has the role {role!r}: expected {', '.join(roles)}{nearest(str(role), roles)}")
    return roles[role]


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    value = row.get("tools")
    if isinstance(value, str):
        value = _loads(value) if value.strip() else None
    if not value:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"'tools' is {describe(row['tools'])}: expected a list of JSON schemas, or a text that spells one")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def _loads(text: str) -> Any:
    """The JSON a text spells, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _has(*names: str) -> Callable[[Row], bool]:
    def fits(row: Row) -> bool:
        return all(isinstance(row.get(name), (str, int, float)) or _is_text_list(row.get(name)) for name in names)

    return fits


def _is_text_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, str) for item in value)


def _has_turns(*keys: str) -> Callable[[Row], bool]:
    def fits(row: Row) -> bool:
        for name in ("messages", "conversations"):
            turns = row.get(name)
            if isinstance(turns, (list, tuple)) and turns and isinstance(turns[0], Mapping):
                return all(key in turns[0] for key in keys)
        return False

    return fits


TEXTS = (("text", "text_pair"), ("sentence1", "sentence2"), ("sentence", "sentence2"), ("premise", "hypothesis"))
"""What a labelled row may call its text and, where it judges a pair, the second one; the first that is there counts."""


def labelled(template: str | None = None) -> Format:
    """The format of rows with a label, which stands where an answer would.

    Args:
        template: the text out of the row's columns; None where a column holds it.
    """

    def convert(row: Row) -> list[Conversation]:
        label = row.get("label")
        if label is None or (isinstance(label, float) and not math.isfinite(label)):
            raise BadRow(
                f"has no label: 'label' is {describe(label) if label is None else label}"
                if "label" in row
                else lacks("label", row)
            )
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # as tables write whole numbers where a row has none
        turn = Turn("user", fill(template, row)) if template is not None else _judged(row)
        return [Conversation((turn, Turn("assistant", as_text({"label": label}, "label"), learn=True)), plain=True)]

    if template is not None:
        names = ("label", *template_fields(template))
        return Format("labelled", "text", ", ".join(names), lambda row: all(n in row for n in names), convert)
    shape = "label, text, and text_pair for pairs"
    return Format("labelled", "text", shape, lambda row: "label" in row and any(t in row for t, _ in TEXTS), convert)


def _judged(row: Row) -> Turn:
    """The text, or pair of texts, of a labelled row."""
    first, second = next(((a, b) for a, b in TEXTS if row.get(a) is not None), TEXTS[0])
    return Turn("user", as_text(row, first), context=_optional(row, second))


FORMATS = {
    form.name: form
    for form in (
        Format("messages", "chat", "messages: [{role, content}]", _has_turns("role", "content"), _messages),
        Format("sharegpt", "chat", "conversations: [{from, value}]", _has_turns("from", "value"), _sharegpt),
        Format("alpaca", "instruction", "instruction, input, output", _has("instruction", "output"), _alpaca),
        Format(
            "prompt_completion", "instruction", "prompt, completion", _has("prompt", "completion"), _prompt_completion
        ),
        Format("text", "text", "text", _has("text"), _text),
        labelled(),
    )
}
"""In the order they are tried: a row that has a `text` besides an instruction is an instruction.
Labelled rows are never guessed: whether the label of a text is learnt is the objective's to say."""
GUESSED = {name: form for name, form in FORMATS.items() if name != "labelled"}


def templated(template: str, whole: bool) -> Format:
    """The format of rows that `data.template` writes out, without a chat template.

    Args:
        template: the prompt, or the whole text.
        whole: the template is the whole text to learn (`data.format=text`); else `completion` is what follows it.
    """

    def convert(row: Row) -> list[Conversation]:
        text = fill(template, row)
        if whole:
            return _text({"text": text})
        prompt = Turn("user", text)
        return [
            Conversation((prompt, Turn("assistant", answer, learn=True)), plain=True)
            for answer in _answers(row, "completion")
        ]

    names = [*template_fields(template), *([] if whole else ["completion"])]
    return Format("template", "text", ", ".join(names), lambda row: all(name in row for name in names), convert)


def recognise(config: DataConfig, source: str, first_rows: Sequence[RawRow]) -> Format:
    """The format of a source: the named one, else the one that most of its first rows fit.

    Args:
        config: names it, renames columns, or gives a template.
        source: its name, in messages.
        first_rows: some rows from its beginning.

    Raises:
        DataError: when there is no readable row, a column named in the configuration is in none of them, or no format
        fits.
    """
    rows = [row.value for row in first_rows if row.fault is None and isinstance(row.value, Mapping)]
    if not rows:
        reason = next(
            (f"{row.origin} {row.fault or 'is ' + describe(row.value)}" for row in first_rows), "it holds no rows"
        )
        raise DataError(f"{source}: no usable row: {reason}; expected rows that are JSON objects")
    renamed = []
    problem = ""
    for row in rows:
        try:
            renamed.append(rename(row, config.columns))
        except BadRow as bad:
            problem = problem or str(bad)
    if not renamed:
        raise DataError(f"{source}: data.columns does not fit: the first row {problem}")
    if config.format == "labelled":
        return _checked(
            labelled(config.template), source, renamed, "a classifier or regressor learns labels: rows need"
        )
    if config.template is not None:
        form = templated(config.template, whole=config.format == "text")
        return _checked(form, source, renamed, "data.template needs the columns")
    if config.format != "auto":
        return _checked(FORMATS[config.format], source, renamed, f"data.format={config.format} needs")
    votes = Counter({name: sum(form.fits(row) for row in renamed) for name, form in GUESSED.items()})
    name, count = votes.most_common(1)[0]  # most_common keeps the order of GUESSED among equals
    if not count:
        raise DataError(_unrecognised(source, renamed[0]))
    return FORMATS[name]


def _checked(form: Format, source: str, rows: Sequence[Row], need: str) -> Format:
    if any(form.fits(row) for row in rows):
        return form
    try:
        form.convert(rows[0])
        reason = f"has {', '.join(map(str, rows[0]))}"
    except BadRow as bad:
        reason = str(bad)
    named = {
        "template": "the answer's column with data.columns={completion: ...}",
        "labelled": "the columns with data.columns={text: ..., label: ...}",
    }
    extra = f"; name {named[form.name]}" if form.name in named else ""
    raise DataError(f"{source}: {need} {form.shape}: the first row {reason}{extra}")


def _unrecognised(source: str, row: Row) -> str:
    seen = ", ".join(name if isinstance(value, str) else f"{name} ({describe(value)})" for name, value in row.items())
    shapes = "; ".join(f"{form.name} {{{form.shape}}}" for form in GUESSED.values())
    return (
        f"{source}: no format recognised: its rows have {seen or 'no columns'}; expected {shapes}; "
        "name the columns with data.columns={prompt: ..., completion: ...} or write a data.template"
    )

"""`data.columns` and `data.template`: rows whose columns have names of their own."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow
from finetune.errors import ConfigError, nearest

FIELDS = (
    "text", "instruction", "input", "output", "system", "prompt", "completion", "messages", "conversations", "tools",
    "text_pair", "label",
)  # fmt: skip
"""What the formats call their columns: the left side of `data.columns`."""


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse a `data.columns` whose left sides are no fields.

    Raises:
        ConfigError: naming the nearest field, or the turned-round pair.
    """
    for field, column in columns.items():
        if field in FIELDS:
            continue
        hint = f"; write {{{column}: {field}}}" if column in FIELDS else nearest(field, FIELDS)
        raise ConfigError(
            f"data.columns names the field {field!r}: expected field: column with one of {', '.join(FIELDS)}{hint}"
        )


def template_fields(template: str) -> list[str]:
    """Columns that a `data.template` names, in order. Nothing but `{name}`, `{{` and `}}` is allowed in it.

    `str.format` itself is never called: it would follow attributes and indices.

    Raises:
        ConfigError: for a template that cannot be read or names no column.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"data.template is {template!r}: {error}; write {{{{ and }}}} for braces of the text"
        ) from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion):
            raise ConfigError(
                f"data.template is {template!r}: expected {{column}} without '!' and ':', found {{{name}...}}"
            )
    names = [name for _, name, _, _ in parts if name is not None]
    if not names:
        raise ConfigError(f"data.template is {template!r}: it names no column; write e.g. 'Q: {{question}}\\nA: '")
    return names


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's values in place of `{column}`.

    Raises:
        BadRow: when the row lacks a column or holds something other than a text or number there.
    """
    return "".join(
        literal + ("" if name is None else as_text(row, name))
        for literal, name, _, _ in string.Formatter().parse(template)
    )


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the fields of `data.columns` added under their own names.

    Raises:
        BadRow: when the row lacks such a column.
    """
    for column in columns.values():
        if column not in row:
            raise BadRow(lacks(column, row))
    return {**row, **{field: row[column] for field, column in columns.items()}}


def as_text(row: Mapping[str, Any], name: str) -> str:
    """The text in a column; numbers and truth values are written as JSON writes them.

    Raises:
        BadRow: when the column is missing, null, or holds something else.
    """
    if name not in row:
        raise BadRow(lacks(name, row))
    value = row[name]
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    raise BadRow(f"{name!r} is {describe(value)}: expected a text")


def lacks(column: str, row: Mapping[str, Any]) -> str:
    """Words for a column that is not there."""
    names = [str(name) for name in row]
    return f"has no {column!r}: it has {', '.join(names) or 'no columns'}{nearest(column, names)}"


def describe(value: Any) -> str:
    """A value in a few words, e.g. "a list of objects (input, output)"."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"an object ({', '.join(str(key) for key in value)})"[:80]
    if isinstance(value, (list, tuple)):
        if not value:
            return "an empty list"
        first = value[0]
        return "a list of texts" if isinstance(first, str) else f"a list, its first item {describe(first)}"
    words = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return words.get(type(value), type(value).__name__)

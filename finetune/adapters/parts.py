"""The settings of a method given as a plain mapping, checked as strictly as the configuration tree is."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from finetune.adapters.base import ADAPTERS, AdapterConfig
from finetune.errors import ConfigError, UserError, nearest_or_all

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def read_part(part: Any, where: str, shared: Mapping[str, Any]) -> AdapterConfig:
    """The config of a method from a mapping.

    Args:
        part: `name` and settings of the method.
        where: how messages call it, e.g. adapter.parts[0].
        shared: values of settings that it does not give itself.

    Raises:
        ConfigError: for anything but a mapping, an unknown method or key (all of these at once), a wrong value.
    """
    kind = _kind(part, where)
    strays = stray_keys(part, where)
    if strays:
        raise ConfigError("; ".join(strays))
    types = typing.get_type_hints(kind)
    for key, value in part.items():
        if not _fits(value, types[key]):
            raise ConfigError(f"{where}.{key} is {value!r}: expected {_words(types[key])}")
    try:
        return kind(**{**shared, **part})
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from error


def stray_keys(part: Any, where: str) -> list[str]:
    """A message for every key of a mapping that its method does not have; none for anything else than a mapping.

    Raises:
        ConfigError: for an unknown method.
    """
    if not isinstance(part, Mapping):
        return []
    known = [field.name for field in fields(_kind(part, where))]
    return [f"unknown key '{where}.{key}'{nearest_or_all(str(key), known)}" for key in part if key not in known]


def _kind(part: Any, where: str) -> type[AdapterConfig]:
    """The config type of the method that a mapping names."""
    if not isinstance(part, Mapping) or "name" not in part:
        raise ConfigError(f"{where} is {part!r}: expected a mapping with a name, such as {{name: lora, rank: 8}}")
    try:
        return ADAPTERS.type_of(str(part["name"]))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def labels(methods: Sequence[str]) -> list[str]:
    """A name for each part: its method, numbered from the second of a kind."""
    counts: dict[str, int] = {}
    names = []
    for method in methods:
        counts[method] = counts.get(method, 0) + 1
        names.append(method if counts[method] == 1 else f"{method}-{counts[method]}")
    return names


def _options(expected: Any) -> tuple[Any, ...]:
    """The members of a union; none for any other type."""
    return () if typing.get_origin(expected) is list else typing.get_args(expected)


def _fits(value: Any, expected: Any) -> bool:
    """Whether a value from YAML is of a field's type; a number without a fraction does for any number."""
    if expected is Any:
        return True
    if _options(expected):
        return any(_fits(value, option) for option in _options(expected))
    if typing.get_origin(expected) is list:
        (inner,) = typing.get_args(expected)
        return isinstance(value, list) and all(_fits(entry, inner) for entry in value)
    if expected in (int, float):
        return isinstance(value, (int, expected)) and not isinstance(value, bool)
    return isinstance(value, expected)


def _words(expected: Any) -> str:
    """A type as people say it."""
    return " or ".join(map(_words, _options(expected))) or WORDS.get(expected, "a list")

"""What `data.train` names: files, directories, hub datasets, the interpreter's documentation, rows in memory."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from finetune.data.config import DataConfig
from finetune.data.files import SUFFIXES, RawRow, check_file, directory_files, missing, read_file
from finetune.data.formats import Format, recognise
from finetune.data.templates import check_chat_template
from finetune.errors import ConfigError, DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+){0,2}")
PYDOCS = "pydocs"
_PEEK = 20
"""Rows that a format is recognised from."""


@dataclass(frozen=True)
class Source:
    """One place that rows come from.

    Attributes:
        name: as the user wrote it; in messages.
        key: `data.train` or `data.eval`.
        weight: how often each of its rows is seen in an epoch.
        files: of a path; empty otherwise.
        rows: of a list in memory; None otherwise.
        side: which half of `pydocs`, "train" or "eval".
    """

    name: str
    key: str
    weight: float = 1.0
    files: tuple[Path, ...] = ()
    rows: tuple[Any, ...] | None = None
    side: Literal["train", "eval"] = "train"

    @property
    def is_pydocs(self) -> bool:
        return self.name == PYDOCS and self.rows is None and not self.files

    def read(self) -> Iterator[RawRow]:
        """The rows in order, each with the place it stands at.

        Raises:
            DataError: for a fault of a whole file or of the hub.
        """
        if self.rows is not None:
            for number, row in enumerate(self.rows, 1):
                yield RawRow(f"{self.name}:{number}", row)
        elif self.files:
            for path in self.files:
                yield from read_file(path)
        elif self.is_pydocs:
            from finetune.data.pydocs import pydocs_rows

            for number, row in enumerate(pydocs_rows(self.side), 1):
                yield RawRow(f"pydocs:{row.get('name', number)}", row)
        else:
            for number, row in enumerate(_hub_dataset(self.name, self.key), 1):
                yield RawRow(f"{self.name}:{number}", row)

    def digest(self) -> str:
        """Changes whenever the rows do: SHA-256 over the bytes of files, the JSON of rows, or the hub's fingerprint."""
        sha = hashlib.sha256(f"{self.name}|{self.weight}|{self.side}|".encode())
        for path in self.files:
            with path.open("rb") as stream:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
            sha.update(path.name.encode())
        if not self.files and self.rows is None and not self.is_pydocs:
            sha.update(str(_hub_dataset(self.name, self.key)._fingerprint).encode())
        elif not self.files:
            for row in self.read():
                sha.update(json.dumps(row.value, sort_keys=True, default=str).encode())
        return sha.hexdigest()


def resolve(value: Any, key: str, side: Literal["train", "eval"] = "train") -> list[Source]:
    """Sources named by a config value: a string or path, a list or a mapping to weights of them, or a list of rows.

    Args:
        value: of `data.train` or `data.eval`.
        key: which of them, in messages.
        side: "train" or "eval", for `pydocs`.

    Raises:
        ConfigError: for a value of another kind, or a weight that is not more than 0.
        DataError: when a path does not exist or a directory holds no data file.
    """
    if isinstance(value, (str, Path)):
        return [_one(str(value), key, 1.0, side)]
    if isinstance(value, Mapping):
        return [_one(str(name), key, _weight(name, weight, key), side) for name, weight in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        if any(isinstance(item, Mapping) for item in value):
            return [Source(f"{key} row", key, rows=tuple(value))]
        return [source for item in value for source in resolve(item, key, side)]
    raise ConfigError(
        f"{key} is {value!r}: expected a file, a directory, a hub dataset id, `pydocs`, a list or a mapping to weights"
    )


def check_sources(config: DataConfig) -> None:
    """Look at what can be seen without a tokenizer, so that a mistake shows before a model is loaded.

    Every file must exist, hold something, begin like what its name promises, and have first rows of a known format; a
    chat template file must parse. Hub datasets and pydocs are left to `prepare`.

    Raises:
        DataError: naming the file and what is wrong with it.
        ConfigError: for a source of the wrong kind or a chat template that cannot be used.
    """
    check_chat_template(config.chat_template)
    named = resolve(config.train, "data.train")
    if config.eval is not None:
        named += resolve(config.eval, "data.eval", side="eval")
    for source in named:
        for path in source.files:
            check_file(path)
        if source.files or source.rows is not None:
            recognise_all(config, [source])


def recognise_all(config: DataConfig, sources: list[Source]) -> list[Format]:
    """The format of each source, from its first rows.

    Raises:
        DataError: when one has none that is known.
    """
    return [recognise(config, source.name, list(islice(source.read(), _PEEK))) for source in sources]


def _weight(name: Any, weight: Any, key: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ConfigError(f"{key} gives {name} the weight {weight!r}: expected a number more than 0")
    return float(weight)


def _one(name: str, key: str, weight: float, side: Literal["train", "eval"]) -> Source:
    if name == PYDOCS:  # a directory of that name is ./pydocs
        return Source(name, key, weight, side=side)
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return Source(name, key, weight, files=tuple(directory_files(path, key)))
        if path.exists():
            return Source(name, key, weight, files=(path,))
        looks_like_file = name.lower().removesuffix(".gz").endswith(SUFFIXES)
        if _HUB_ID.fullmatch(name) and not looks_like_file and not path.parent.is_dir():
            return Source(name, key, weight)
        raise missing(path, key)
    except OSError as error:
        raise DataError(f"{key}: {name} cannot be read: {error.strerror or error}") from None


@functools.cache
def _hub_dataset(name: str, key: str) -> Any:
    """A dataset of the Hugging Face hub: `owner/name`, `owner/name:split` or `owner/name:config:split`."""
    import datasets

    owner_name, *parts = name.split(":")
    split = parts[-1] if parts else "train"
    config = parts[0] if len(parts) == 2 else None
    try:
        return datasets.load_dataset(owner_name, config, split=split)
    except Exception as error:  # the network, the hub and the builders raise dozens of types; all mean the same here
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{key}: hub dataset {name!r} cannot be loaded: {first_line}") from error

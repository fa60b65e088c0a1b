"""Files of rows: JSON lines, a JSON array, CSV, TSV, Parquet, plain or gzipped.

A fault of a file (missing, empty, not text, not what it claims to be) is a `DataError`; a fault of one row comes back
as a `RawRow` with a reason, for the caller to count.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetune.errors import DataError, nearest

_HEAD = 1 << 20
_LFS = b"version https://git-lfs.github.com/spec/"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in its file.

    Attributes:
        origin: where, `file:line`.
        value: the row; anything that JSON can say.
        fault: why it cannot be read; None where it can.
    """

    origin: str
    value: Any
    fault: str | None = None


def read_file(path: Path) -> Iterator[RawRow]:
    """Rows of a file, read as its suffix says.

    Raises:
        DataError: for a fault of the whole file.
    """
    check_file(path)
    yield from _READERS[_suffix(path)](path)


def check_file(path: Path) -> None:
    """Look at a file's name and first megabyte.

    Raises:
        DataError: when it is unreadable, empty, a Git LFS pointer, of no known suffix, or not UTF-8 text.
    """
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: no reader for {suffix or 'a file without suffix'}; expected {', '.join(SUFFIXES)}")
    try:
        with _open(path) as stream:
            head = stream.read(_HEAD)
    except EOFError:
        raise DataError(f"{path} is cut off: the gzip stream ends too early") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if head.startswith(_LFS):
        raise DataError(f"{path} is a Git LFS pointer, not the data itself: run `git lfs pull` where it was cloned")
    if suffix == ".parquet":
        if head and head[:4] != b"PAR1":
            raise DataError(f"{path} is not a Parquet file: it begins with {head[:4]!r}, expected b'PAR1'")
    else:
        _check_text(path, head)
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(f"{path} is empty")


def directory_files(path: Path, key: str) -> list[Path]:
    """Data files of a directory, by name, not below it.

    Raises:
        DataError: when there is none.
    """
    found = sorted(
        child
        for child in path.iterdir()
        if child.is_file() and not child.name.startswith(".") and _suffix(child) in SUFFIXES
    )
    if not found:
        seen = ", ".join(sorted(child.name for child in path.iterdir())[:5]) or "nothing"
        raise DataError(f"{key}: directory {path} holds no data file ({', '.join(SUFFIXES)}): it holds {seen}")
    return found


def missing(path: Path, key: str) -> DataError:
    """The error for a path that does not exist, with the nearest thing that does."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    if parent != path.parent and parent.is_dir():
        wanted = path.relative_to(parent).parts[0]
        near = nearest(wanted, (child.name for child in parent.iterdir()))
        return DataError(f"{key}: {path} does not exist: there is no {wanted!r} in {parent}{near}")
    return DataError(f"{key}: {path} does not exist{nearest(path.name, (child.name for child in parent.iterdir()))}")


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz") and _suffix(path) != ".parquet":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _check_text(path: Path, head: bytes) -> None:
    if head.startswith(_UTF16):
        raise DataError(f"{path} is UTF-16 (it begins with a byte order mark {head[:2].hex(' ')}): save it as UTF-8")
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(head, final=len(head) < _HEAD)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.object[error.start], error.start) from None


def _not_utf8(path: Path, byte: int, offset: int) -> DataError:
    return DataError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset}; save it as UTF-8")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends; a byte order mark of UTF-8 is left out.

    Raises:
        DataError: at the first byte that is not UTF-8, with its offset, and when a gzip stream is broken.
    """
    offset = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                start = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
                try:
                    yield number, line[start:].decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, line[start + error.start], offset + start + error.start) from None
                offset += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a broken gzip file: {error}") from None


def _read_json(path: Path) -> Iterator[RawRow]:
    """Lines of JSON, or one array of rows; told apart by the first character."""
    lines = _lines(path)
    for _, line in lines:
        if line.strip():
            break
    if line.strip() == "{":
        raise DataError(f"{path} is one JSON object over several lines: expected an array of rows, or a row a line")
    yield from _read_array(path) if line.lstrip().startswith("[") else _read_lines(path)


def _read_lines(path: Path) -> Iterator[RawRow]:
    for number, line in _lines(path):
        if line.strip():
            yield _parse(f"{path}:{number}", line)


def _parse(origin: str, line: str) -> RawRow:
    try:
        return RawRow(origin, json.loads(line))
    except json.JSONDecodeError as error:
        return RawRow(origin, None, f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RawRow(origin, None, f"is not JSON that can be read: {error}")


def _read_array(path: Path) -> Iterator[RawRow]:
    """Elements of a JSON array one by one, so that each knows the line it begins at."""
    text = "\n".join(line for _, line in _lines(path))
    decoder, place, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0

    def skip(place: int, characters: str) -> int:
        while place < len(text) and text[place] in characters:
            place += 1
        return place

    place = skip(place, " \t\r\n")
    while place < len(text) and text[place] != "]":
        line += text.count("\n", counted, place)
        counted = place
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path} is broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is broken JSON in the row at line {line}: {error}") from None
        yield RawRow(f"{path}:{line}", value)
        place = skip(place, " \t\r\n")
        if place < len(text) and text[place] not in ",]":
            where = text.count("\n", 0, place) + 1
            raise DataError(f"{path} is broken JSON at line {where}: expected ',' or ']' and found {text[place]!r}")
        if text[place : place + 1] == ",":
            place = skip(place + 1, " \t\r\n")
    if place >= len(text):
        raise DataError(f"{path} is broken JSON: the array that begins at its start is never closed")
    after = skip(place + 1, " \t\r\n")
    if after < len(text):
        where = text.count("\n", 0, after) + 1
        raise DataError(f"{path} is broken JSON: something follows the array at line {where}")


def _read_csv(path: Path) -> Iterator[RawRow]:
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    csv.field_size_limit(1 << 30)  # the default, 128 KiB, is less than one long document
    rows = csv.reader((line + "\n" for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(rows)
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: the header names the column {twice!r} twice")
        line = rows.line_num + 1
        for values in rows:
            origin, line = f"{path}:{line}", rows.line_num + 1
            if not values:
                continue
            fault = (
                None if len(values) == len(header) else f"has {len(values)} fields where the header has {len(header)}"
            )
            yield RawRow(origin, dict(zip(header, values, strict=False)), fault)
    except csv.Error as error:
        raise DataError(f"{path} is broken CSV near line {rows.line_num}: {error}") from None


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}:{number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is a broken Parquet file: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)

"""Where rows come from, and every fault of a file in its own words."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.data.config import DataConfig
from finetune.data.files import read_file
from finetune.data.sources import check_sources, resolve
from finetune.errors import ConfigError, DataError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text(LINES, "utf-8"),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "rows.ndjson": lambda path: path.write_text(LINES.replace("\n", "\r\n"), "utf-8"),
    "lines.json": lambda path: path.write_text("\n" + LINES, "utf-8"),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), "utf-8"),
    "rows.csv": write_csv,
    "rows.csv.gz": lambda path: (write_csv(path), path.write_bytes(gzip.compress(path.read_bytes()))),
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.parquet": write_parquet,
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.encode()),
    "bom.csv": lambda path: (write_csv(path), path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())),
    "bom.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
}  # fmt: skip


def values(train: Any) -> list[Any]:
    return [row.value for source in resolve(train, "data.train") for row in source.read()]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    check_sources(DataConfig(train=str(tmp_path / name)))
    assert values(str(tmp_path / name)) == ROWS


def test_rows_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + LINES, "utf-8")
    (tmp_path / "b.json").write_text('[\n {"a": 1},\n\n {"a":\n  2},\n {"a": 3}\n]\n', "utf-8")
    (tmp_path / "c.csv").write_text('a,b\n1,"two\nlines"\n3,4\n', "utf-8")
    lines = {
        name: [row.origin.rsplit(":", 1)[1] for row in read_file(tmp_path / name)]
        for name in ("a.jsonl", "b.json", "c.csv")
    }
    assert lines == {"a.jsonl": ["2", "3", "4"], "b.json": ["2", "4", "6"], "c.csv": ["2", "4"]}


def test_directory_reads_its_data_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert values(str(tmp_path)) == [{"text": "a"}, {"text": "b"}]
    assert values(tmp_path) == [{"text": "a"}, {"text": "b"}]


def test_directory_without_data_files_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no data file \(.jsonl.*it holds notes.docx"):
        resolve(str(tmp_path), "data.train")


def test_lists_weights_and_rows_in_memory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert [row["text"] for row in values(paths)] == ["a", "b"]
    assert [source.weight for source in resolve(dict(zip(paths, (2, 0.5), strict=True)), "data.train")] == [2.0, 0.5]
    assert values([{"text": "x"}, {"text": "y"}]) == [{"text": "x"}, {"text": "y"}]


@pytest.mark.parametrize("weight", [0, -1, "much", True, float("nan"), float("inf")])
def test_a_weight_has_to_be_a_positive_number(weight: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"data\.train gives .*a\.jsonl the weight .*: expected a number more than 0"):
        resolve({str(tmp_path / "a.jsonl"): weight}, "data.train")


def test_sources_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.train is 3: expected a file, a directory, a hub dataset id"):
        resolve(3, "data.train")


FAULTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", r"a\.jsonl is empty"),
    "blank": ("a.jsonl", b"\n \n", r"a\.jsonl is empty"),
    "only a byte order mark": ("a.jsonl", b"\xef\xbb\xbf", r"a\.jsonl is empty"),
    "latin-1": ("a.jsonl", '{"text": "café"}\n'.encode("latin-1"), r"is not UTF-8: byte 0xe9 at offset 13; save it as"),
    "UTF-16": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"is UTF-16 \(it begins with a byte order mark ff fe\)"),
    "UTF-16 CSV": ("a.csv", b"\xfe\xff" + "a,b\n".encode("utf-16-be"), r"is UTF-16 .*fe ff"),
    "LFS pointer": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        r"a\.jsonl is a Git LFS pointer, not the data itself: run `git lfs pull`",
    ),
    "LFS pointer for Parquet": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "not Parquet": ("a.parquet", b"hello world", r"is not a Parquet file: it begins with b'hell', expected b'PAR1'"),
    "unknown suffix": ("a.docx", b"x", r"no reader for \.docx; expected \.jsonl"),
    "no suffix": ("rows", b"x", r"no reader for a file without suffix"),
    "not gzip": ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], r"is cut off: the gzip stream ends too early"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_file_are_named_before_any_model_is_loaded(fault: str, tmp_path: Path) -> None:
    name, content, words = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        check_sources(DataConfig(train=str(tmp_path / name)))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_file_for_evaluation_is_checked_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "e.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"e\.jsonl is empty"):
        check_sources(DataConfig(train=str(tmp_path / "a.jsonl"), eval=str(tmp_path / "e.jsonl")))


def test_bytes_that_are_not_utf8_far_inside_are_found_with_their_offset(tmp_path: Path) -> None:
    content = b'{"text": "a"}\n' * 100_000 + b'{"text": "\xff"}\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"is not UTF-8: byte 0xff at offset {content.index(0xFF)}"):
        list(read_file(tmp_path / "a.jsonl"))


def test_offsets_count_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\xff"}\n')
    with pytest.raises(DataError, match="byte 0xff at offset 13"):
        check_sources(DataConfig(train=str(tmp_path / "a.jsonl")))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train_rows.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"train_row\.jsonl does not exist; did you mean 'train_rows\.jsonl'\?"):
        check_sources(DataConfig(train=str(tmp_path / "train_row.jsonl")))
    with pytest.raises(DataError, match=r"there is no 'no' in .*"):
        check_sources(DataConfig(train=str(tmp_path / "no" / "such" / "rows.jsonl")))


def test_a_relative_name_without_directory_is_a_missing_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"data\.train: row\.jsonl does not exist; did you mean 'rows\.jsonl'\?"):
        check_sources(DataConfig(train="row.jsonl"))


BROKEN_ARRAYS = {
    '[{"a": 1},\n {"a": }\n]': "broken JSON at line 2, column 8: Expecting value",
    '[{"a": 1}\n {"a": 2}]': "broken JSON at line 2: expected ',' or ']' and found '{'",
    '[{"a": 1},\n': "the array that begins at its start is never closed",
    '[{"a": 1}]\nmore': "something follows the array at line 2",
    "[" * 100_000: "broken JSON in the row at line 1: maximum recursion depth",
}


@pytest.mark.parametrize("text", BROKEN_ARRAYS, ids=lambda text: text[:20])
def test_a_broken_array_is_a_fault_of_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=BROKEN_ARRAYS[text]):
        list(read_file(tmp_path / "a.json"))


def test_one_pretty_printed_object_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}, indent=2))
    with pytest.raises(
        DataError, match="is one JSON object over several lines: expected an array of rows, or a row a line"
    ):
        list(read_file(tmp_path / "a.json"))


def test_a_broken_line_is_a_fault_of_the_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n' + "[" * 100_000 + '\n{"a": 2}\n')
    rows = list(read_file(tmp_path / "a.jsonl"))
    assert [row.fault is None for row in rows] == [True, False, False, True]
    assert rows[1].fault == "is not JSON: Expecting value at column 7"
    assert rows[1].origin.endswith("a.jsonl:2")


def test_csv_rows_of_another_width_are_faults_of_the_row_and_broken_quotes_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n1\n\n4,5\n")
    faults = [row.fault for row in read_file(tmp_path / "a.csv")]
    assert faults == [None, "has 3 fields where the header has 2", "has 1 fields where the header has 2", None]
    (tmp_path / "b.csv").write_text('a,b\n"1"x,2\n')
    with pytest.raises(DataError, match="is broken CSV near line 2"):
        list(read_file(tmp_path / "b.csv"))
    (tmp_path / "c.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match=r"c\.csv: the header names the column 'a' twice"):
        list(read_file(tmp_path / "c.csv"))


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-7])
    with pytest.raises(DataError, match="is a broken Parquet file: ") as caught:
        list(read_file(tmp_path / "a.parquet"))
    assert "\n" not in str(caught.value)


def test_a_hub_dataset_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nwith a long explanation")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    (source,) = resolve("some-owner/not-a-dataset", "data.train")
    with pytest.raises(
        DataError, match=r"hub dataset 'some-owner/not-a-dataset' cannot be loaded: Couldn't reach the Hub$"
    ):
        list(source.read())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("o/n", ("o/n", None, "train")), ("o/n:test", ("o/n", None, "test")), ("o/n:en:test", ("o/n", "en", "test"))],
)
def test_a_hub_id_may_name_config_and_split(
    name: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    called = []

    def load(owner_name: str, config: str | None, *, split: str) -> Any:
        called.append((owner_name, config, split))
        return datasets.Dataset.from_list([{"text": f"{owner_name} {i}"} for i in range(2)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row["text"] for row in values(name)] == ["o/n 0", "o/n 1"]
    assert called == [expected]


def test_a_digest_follows_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    before = resolve(str(path), "data.train")[0].digest()
    assert resolve(str(path), "data.train")[0].digest() == before
    path.write_text(LINES.replace("answer 1", "answer x"))
    assert resolve(str(path), "data.train")[0].digest() != before
    assert resolve([{"text": "a"}], "data.train")[0].digest() != resolve([{"text": "b"}], "data.train")[0].digest()


def test_a_format_that_is_not_recognised_shows_before_any_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: no format recognised: its rows have question, answer"):
        check_sources(DataConfig(train=str(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match=r"data\.eval row: no format recognised"):
        check_sources(DataConfig(train=[{"text": "a"}], eval=[{"question": "q"}]))
    check_sources(DataConfig(train=str(tmp_path / "a.jsonl"), columns={"prompt": "question", "completion": "answer"}))


def test_looking_at_sources_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    code = (
        "import sys\nfrom finetune.data.config import DataConfig\nfrom finetune.data.sources import check_sources\n"
        f"check_sources(DataConfig(train={str(tmp_path / 'a.jsonl')!r}))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_no_file_system_takes_is_one_line() -> None:
    with pytest.raises(DataError, match=r"x\.jsonl cannot be read: File name too long"):
        resolve("x" * 5000 + "x.jsonl", "data.train")

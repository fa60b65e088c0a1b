"""Fixtures of the data room: tokenizers, and where the real data lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import Write
from data_tokenizers import KINDS, byte_level

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Each kind of tokenizer in turn."""
    return KINDS[request.param]()


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    """A byte-level tokenizer without BOS."""
    return byte_level()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    """A byte-level tokenizer that begins every text with BOS."""
    return byte_level(bos=True)


@pytest.fixture(scope="session")
def stories_tokenizer() -> Any:
    """The real tokenizer whose prompt tokens are no prefix of the whole's tokens."""
    path = SHARED / "models" / "tinystories-656k"
    if not path.is_dir():
        pytest.skip(f"needs the tinystories-656k tokenizer in {path}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real public rows."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"needs the public data files in {path}")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another run has cached."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows as JSON lines (texts as they are) and returns the path."""

    def write_rows(rows: list[Any], name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), "utf-8")
        return str(tmp_path / name)

    return write_rows

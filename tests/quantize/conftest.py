"""Text that most tests of this room calibrate on."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantize_models


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_models.text(tmp_path_factory.mktemp("text") / "rows.jsonl")

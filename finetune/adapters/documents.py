"""JSON files of a saved adapter: PEFT's adapter_config.json, and those of our own beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import ModelError


def read_document(path: Path) -> Any:
    """What a file holds; nothing is said of what that should be.

    Raises:
        ModelError: when it cannot be read as JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error


def write_document(path: Path, value: dict[str, Any]) -> None:
    """Write an object, its keys in order, so that the same settings make the same bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")

"""Rows to prepare, and preparing them in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.data.config import DataConfig
from finetune.data.masking import show_mask
from finetune.data.prepare import Prepared, prepare
from finetune.data.rows import TokenRows

Write = Callable[..., str]


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "completion": f"the answer {i}"} for i in range(start, start + count)]


def ready(train: Any, tokenizer: Any, context: int = 256, seed: int = 0, **settings: Any) -> Prepared:
    return prepare(DataConfig(train=train, **settings), tokenizer, context=context, seed=seed)


def texts(rows: TokenRows, tokenizer: Any) -> list[str]:
    return [show_mask(row, tokenizer) for row in rows]

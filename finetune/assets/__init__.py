"""The embedded base model and its tokenizer, made by `scripts/pretrain_tiny.py`; see docs/embedded-base.md."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = Path(__file__).resolve().parent / "tiny"

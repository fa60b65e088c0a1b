"""An adapter on disk with all that belongs to it: PEFT's two files, its origin, and the tokenizer trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from finetune.adapters.base import Adapter
from finetune.adapters.provenance import write_provenance
from finetune.export.directory import published, write_json


class Origin(Protocol):
    """Where an adapter comes from: what `finetune.model.load` returns, or an `ExportSource`."""

    @property
    def base_path(self) -> str:
        """Directory or hub id of the base."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the chat template trained with."""

    @property
    def digests(self) -> Mapping[str, Any] | None:
        """Of base, tokenizer, chat template and quantization."""

    @property
    def storage(self) -> Mapping[str, Any] | None:
        """How the base is stored, in words."""


def save_adapter(adapter: Adapter, origin: Origin, directory: Path) -> None:
    """Write `directory` so that it appears whole or not at all, replacing an older one."""
    with published(directory) as work:
        write_adapter(adapter, origin, work)


def write_adapter(adapter: Adapter, origin: Origin, directory: Path) -> None:
    """Fill an existing directory: the adapter's own files, its base's name, finetune.json and the tokenizer.

    Each directory of a stack gets the first three, so that it can be used alone.
    """
    adapter.save(directory)
    parts = {name: part.config.name for name, part in adapter.members.items()}
    for name, method in {"": adapter.config.name, **parts}.items():
        path = directory / name / "adapter_config.json"
        config = json.loads(path.read_text("utf-8"))
        write_json(path, config | {"base_model_name_or_path": origin.base_path})
        if origin.digests is not None:
            write_provenance(
                path.parent, origin.digests, method=method, base=origin.base_path, quantization=origin.storage
            )
    origin.tokenizer.save_pretrained(directory)

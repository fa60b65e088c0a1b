"""One load of a model: its settings, and what it finds out on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.model.stored import Storage, quantization_config
from finetune.model.streaming import PageRelease
from finetune.quant.base import QuantConfig


@dataclass
class Loading:
    """One load: its settings, and what it finds out. Shared by everything that transformers copies along the way.

    Attributes:
        quant: the storage format in force.
        dtype: of what stays unquantized, and of what frozen modules stand for.
        stored: how a prequantized checkpoint is stored; None for a dense one.
        kept: names of the linear modules that stayed unquantized, known after loading.
        stacks: whether experts are packed, known after loading.
        conv1ds: whether Conv1Ds are, known then too.
        mismatched: names of tensors whose shape in the checkpoint is not the model's.
        notes: what the user should know.
        key_mapping: renamings without which transformers does not find all weights for the task.
        failure: the first error of an operation, which transformers would only report.
    """

    quant: QuantConfig
    dtype: torch.dtype
    stored: Storage | None = None
    pages: PageRelease = field(default_factory=PageRelease)
    kept: list[str] = field(default_factory=list)
    stacks: bool = False
    conv1ds: bool = False
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    key_mapping: dict[str, str] = field(default_factory=dict)
    failure: Exception | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Loading:
        return self

    def told(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json for the model as it is; None for a dense one."""
        return quantization_config(self.quant, self.dtype, self.kept, stacks=self.stacks, conv1ds=self.conv1ds)

    @contextmanager
    def keeping_failure(self) -> Iterator[None]:
        """Remember the first exception that leaves this block."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            raise

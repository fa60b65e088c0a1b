"""What every adapter has in common that is attached to a model: what trains in it, and how a file fills it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters import peft_format
from finetune.adapters.base import Adapter
from finetune.adapters.full_copy import FullCopy, file_keys, renamed
from finetune.structure import Structure


class AttachedAdapter(Adapter):
    """An adapter whose files are adapter_config.json and adapter_model.safetensors.

    Attributes:
        structure: of the model without it.
        copies: modules that train whole, by name.
    """

    structure: Structure
    copies: dict[str, FullCopy]
    _trainable: dict[str, nn.Parameter]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every tensor that trains, by its full name in the model; a tied one once."""
        return dict(self._trainable)

    def take_over(self, name: str, copy: FullCopy) -> None:
        """Train another adapter's copy of a module in place of the own one."""
        self.copies[name] = copy
        self._trainable = renamed(self._trainable, name, copy)

    @property
    def task_head(self) -> tuple[str, ...]:  # type: ignore[override]
        """The model's."""
        return self.structure.task_head

    @property
    def in_peft(self) -> bool:
        """Where adapter_config.json names one of PEFT's methods."""
        return "peft_type" in self.file_config()

    @abstractmethod
    def file_config(self) -> dict[str, Any]:
        """adapter_config.json: PEFT's where it has the method, else `finetune_method` and the settings."""

    @abstractmethod
    def file_keys(self) -> dict[str, nn.Parameter]:
        """Keys of adapter_model.safetensors and the parameters they fill; tied modules have a key each."""

    def copy_keys(self) -> dict[str, nn.Parameter]:
        """The part of `file_keys` that modules trained whole add, as PEFT names it."""
        return file_keys(self.copies, peft_format.PREFIX)

    def load(self, directory: Path) -> None:
        """Fill the attached tensors from a directory that `save` (or PEFT) wrote.

        Raises:
            ModelError: for another method or other settings, or missing, unexpected or mis-shaped tensors.
        """
        directory = Path(directory)
        saved = peft_format.read_config(directory)
        peft_format.check_method(directory, saved, self.file_config())
        self.check_settings(directory, saved)
        self.fill(directory, self.from_file(saved, peft_format.read_tensors(directory)))

    def check_settings(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Refuse a file whose settings would make its tensors mean something else here.

        What their names and shapes say is checked by these.

        Raises:
            ModelError: naming the setting and both values.
        """

    def from_file(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file in today's layout; a method with more than one layout turns the others into it here."""
        return tensors

    @torch.no_grad()
    def fill(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors by file key into the attached parameters, after checking that they fit exactly."""
        keys = self.file_keys()
        peft_format.check_tensors(directory, {key: p.shape for key, p in keys.items()}, tensors)
        first: dict[int, str] = {}
        for key, parameter in keys.items():
            other = first.setdefault(id(parameter), key)
            if other != key and not torch.equal(tensors[other], tensors[key]):
                raise peft_format.torn(directory, other, key)
        for key, parameter in keys.items():
            parameter.copy_(tensors[key])

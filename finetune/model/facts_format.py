"""What checkpoints in formats of our own have in common: each weight carries its settings as JSON (quant/facts.py)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.model.stored_format import Held, StoredFormat
from finetune.quant.base import QuantConfig


class FactsFormat(StoredFormat):
    """A format whose `mark` is the key of those settings; no stock library reads it.

    Attributes:
        kind: class of its configurations.
    """

    methods = ("finetune",)
    kind: ClassVar[type[QuantConfig]]

    @abstractmethod
    def config(self, stored: dict[str, Tensor], name: str) -> QuantConfig:
        """The settings that a weight carries as one of our configurations.

        Args:
            stored: its state; at least `weight`, not to be looked at, and the settings.
            name: prefix of these keys, for messages.
        """

    def settings(self, told: dict[str, Any], held: Held, where: str) -> QuantConfig:
        name = self.marks(held)[0]
        header, tensor = held[name]
        raw = torch.frombuffer(bytearray(header.read(tensor)), dtype=torch.uint8)
        return self.config({self.mark: raw, "weight": raw}, name.removesuffix(self.mark))

    def settings_of(self, stored: dict[str, Tensor], name: str, quant: QuantConfig) -> QuantConfig:
        return self.config(stored, name.removesuffix("weight"))

    def writes(self, quant: QuantConfig) -> bool:
        return isinstance(quant, self.kind)

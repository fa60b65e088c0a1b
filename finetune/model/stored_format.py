"""What a way of storing quantized weights in a checkpoint has to say of itself; one sub-class a file.

A quantized weight is a tensor `<module>.weight` and companions beside it under names of the format's own. Formats are
told apart by those names among those that a `quant_method` of config.json may mean: bitsandbytes has two, ours may hold
several, and GPTQ and AWQ have the same names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetune.model.headers import Header, StoredTensor
from finetune.quant.base import QuantConfig

Held = Mapping[str, tuple[Header, StoredTensor]]
"""The tensors of a checkpoint by name, each with the header of its file."""


class StoredFormat(ABC):
    """One storage.

    Attributes:
        companions: names beside `weight` in a module's state, relative to the module; none of them the start of another
            that comes later.
        mark: the companion that every weight of this storage has, or how its name begins.
        packs_experts_singly: whether experts that the model stacks lie one by one, as linear layers.
        methods: under which `quant_method` it is found.
        conv1ds: whether stock libraries read Conv1Ds stored so, where they read linear layers.
        derived: whether they read layers of classes derived from `nn.Linear` (Falcon's).
    """

    companions: tuple[str, ...]
    mark: str
    methods: tuple[str, ...]
    packs_experts_singly: bool = False
    conv1ds: bool = True
    derived: bool = True

    def of(self, told: dict[str, Any]) -> StoredFormat:
        """The format as one checkpoint has it, for those whose tensors do not say all.

        Args:
            told: `quantization_config` of its config.json.
        """
        return self

    def marks(self, held: Held) -> list[str]:
        """Names of the tensors that show which weights are stored so."""
        return [name for name in held if f".{self.mark}" in name]

    def weight_of(self, mark: str) -> str:
        """The name of the weight that a mark belongs to."""
        return f"{mark.partition(f'.{self.mark}')[0]}.weight"

    def idle(self, held: Held) -> frozenset[str]:
        """Names of tensors that change nothing, which a model need not have a place for."""
        return frozenset()

    def disguise(self, weight: StoredTensor) -> torch.dtype:
        """The dtype under which a packed weight is written."""
        return torch.uint8

    @abstractmethod
    def settings(self, told: dict[str, Any], held: Held, where: str) -> QuantConfig:
        """Settings of a checkpoint as ours.

        Args:
            told: `quantization_config` of its config.json.

        Raises:
            ModelError: where they do not say, or say what we do not read.
        """

    def settings_of(self, stored: dict[str, Tensor], name: str, quant: QuantConfig) -> QuantConfig:
        """Settings of one weight from its companions, within those of the checkpoint; by default they are the same.

        Raises:
            ModelError: where they do not say.
        """
        return quant

    def state(self, stored: dict[str, Tensor], name: str, quant: QuantConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one weight under the keys that its module takes; by default they are those of the checkpoint.

        Args:
            stored: the weight and its companions, by their names relative to the module.
            name: of the weight.
            quant: what `settings_of` said.
            dtype: that the weight stands for.

        Raises:
            ModelError: where one is missing, naming it.
        """
        return stored

    def writes(self, quant: QuantConfig) -> bool:
        """Whether modules of that configuration save themselves so; by default none do, a layout is only read."""
        return False

    def stock_config(self, quant: QuantConfig, dtype: torch.dtype, kept: list[str]) -> dict[str, Any] | None:
        """`quantization_config` by which stock transformers reads such a model; None where it cannot.

        Args:
            dtype: that stock modules compute in.
            kept: names of the linear modules that are not quantized.
        """
        return None

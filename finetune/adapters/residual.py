"""LoRA that starts from the weight it stands beside: what PiSSA and LoftQ have in common.

Both find their factors from a weight W. Where the base is quantized they can store what is left of W anew: a *residual
base*, in the storage of the base, that the adapted module computes with in place of it. The base itself stays as it
was, for `disabled` and `unmount`, so adapted projections are then held twice.

W is the weight before quantization where it can be read again (`Originals`), else what is stored.

A residual base is part of the adapter. On disk residual.safetensors holds it beside the factors, and
adapter_config.json has LoRA's settings without a `peft_type`: PEFT would put the factors on the wrong base.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.adapters import peft_format
from finetune.adapters.base import Originals
from finetune.adapters.lora import LoRAAdapter, LoRAConfig
from finetune.adapters.own_format import read_as_lora
from finetune.adapters.peft_lora import Saved, read_saved
from finetune.adapters.residual_file import read_residuals, write_residuals
from finetune.adapters.residual_layers import ResidualExperts, ResidualLinear, Weight
from finetune.errors import ConfigError
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight
from finetune.quant.dense import DenseExperts, DenseLinear
from finetune.structure import Projection

RESIDUAL = "residual"
"""Key of adapter_config.json that says which file holds the residual base."""


@dataclass
class ResidualConfig(LoRAConfig):
    """LoRA's settings and how its start is found. The token embedding has no form here.

    Attributes:
        iterations: rounds of storing what is left of a weight and decomposing what that loses.
        niter: power iterations of the randomized singular value decomposition; null for the exact one.
    """

    embeds: ClassVar[bool] = False
    trains_besides: ClassVar[bool] = False
    fewest: ClassVar[int] = 1

    iterations: int = 1
    niter: int | None = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < self.fewest:
            raise ConfigError(f"adapter.iterations is {self.iterations}: expected at least {self.fewest}")
        if self.niter is not None and self.niter < 0:
            raise ConfigError(
                f"adapter.niter is {self.niter}: expected at least 0, or null for the exact decomposition"
            )

    def read(self, directory: Path) -> Saved:
        """What a saved adapter says of itself, with a residual base or without."""
        if peft_format.OWN_METHOD not in peft_format.read_config(directory):
            return read_saved(directory)
        return read_as_lora(directory, self.name, besides=[RESIDUAL])


class ResidualAdapter(LoRAAdapter):
    """LoRA that starts from the base's weights, attached to a model."""

    config: ResidualConfig
    adapted: dict[str, Any]
    instead: ClassVar[str]
    """What happens where the original weights are not at hand, in words."""

    _remark = ""

    def wrap(self, base: FrozenLinear, projection: Projection) -> ResidualLinear:
        """A low-rank product beside a linear layer."""
        return ResidualLinear(base, **self._sizes(projection))

    def wrap_experts(self, base: FrozenExperts, projection: Projection) -> ResidualExperts:
        """A low-rank product beside each expert."""
        return ResidualExperts(base, transposed=projection.transposed, **self._sizes(projection))

    @abstractmethod
    def begin(self, weight: Weight) -> None:
        """Fill the factors of one projection, and give it a residual base where the method does."""

    def reads(self, base: FrozenWeight) -> bool:
        """Whether the weight before quantization is wanted; a dense base is that weight."""
        return not isinstance(base, DenseLinear | DenseExperts)

    @property
    def residuals(self) -> dict[str, FrozenWeight]:
        """The residual bases, by the names of their projections."""
        return {name: module.residual for name, module in self.adapted.items() if module.residual is not None}

    @property
    def note(self) -> str:
        """How near the start is to the weights before quantization, and what a residual base takes."""
        return self._remark

    @property
    def peft_obstacle(self) -> str:
        """PEFT knows no residual base."""
        few = self.config.fewest
        words = f"PEFT knows no residual base, which adapter.iterations={few} does without"
        return words if self.residuals else super().peft_obstacle

    @property
    def keeps_start(self) -> bool:
        """Where there is a residual base."""
        return bool(self.residuals)

    @torch.no_grad()
    def initialise(self, originals: Originals | None = None) -> None:
        """Start every projection from its original weight, or from the stored one where that cannot be read."""
        if any(p.is_meta for p in self.model.parameters()):
            return
        left = {p.name if p.kind == "experts" else f"{p.name}.weight": p for p in self.projections}
        wanted = {name for name, p in left.items() if self.reads(self.adapted[p.name].base)}
        squares: list[Tensor] = []

        def visit(name: str, original: Tensor) -> None:
            if name in wanted and name in left:
                weight = self._weight(left.pop(name), original)
                self.begin(weight)
                squares.append(weight.squares())

        if originals is not None and wanted:
            originals(visit)
        for projection in left.values():
            self.begin(self._weight(projection, None))
        self._remark = self._told(squares, [p.name for name, p in left.items() if name in wanted])

    def _weight(self, projection: Projection, original: Tensor | None) -> Weight:
        return Weight.of(self.adapted[projection.name], projection, original, self.config.niter)

    def _told(self, squares: list[Tensor], unread: list[str]) -> str:
        """What the user should know of the start."""
        parts = []
        if squares:
            whole, before, after = torch.stack(squares).sum(dim=0).tolist()
            shares = (f"{100 * math.sqrt(part / whole):.2f} %" for part in (before, after))
            parts.append(
                f"adapter={self.config.name} starts {len(squares)} projections from their weights before quantization:"
                f" what is stored is off them by {next(shares)} (Frobenius norm), with the factors by {next(shares)}"
            )
        if self.residuals:
            size = sum(residual.bytes() for residual in self.residuals.values()) / 1e6
            parts.append(f"a residual base of {size:,.1f} MB is held beside the base")
        if unread:
            more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
            parts.append(
                f"adapter={self.config.name}: {unread[0]}{more} cannot be read as before quantization: {self.instead}"
            )
        return "; ".join(parts)

    def file_config(self) -> dict[str, Any]:
        """LoRA's; with a residual base not under PEFT's name."""
        config = super().file_config()
        if self.residuals:
            del config["peft_type"]
            config[peft_format.OWN_METHOD] = self.config.name
        return config

    def file_tensors(self) -> dict[str, Tensor]:
        """What adapter_model.safetensors holds."""
        return {key: parameter.detach() for key, parameter in self.file_keys().items()}

    def file_metadata(self) -> dict[str, str]:
        """What its header says."""
        return {}

    def save(self, directory: Path) -> None:
        """Write adapter_config.json, adapter_model.safetensors, and the residual base where there is one."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self.file_config()
        if self.residuals:
            config[RESIDUAL] = write_residuals(directory, self.residuals)
        peft_format.write(directory, self.file_tensors(), config, self.file_metadata())

    def load(self, directory: Path) -> None:
        """Fill the factors, and take over the residual base, from a directory that `save` wrote.

        Raises:
            ModelError: for another method or other settings, and for tensors that are missing or do not fit.
        """
        directory = Path(directory)
        saved = self.config.read(directory)
        self.check_settings(directory, saved.settings)
        config, found = peft_format.read_config(directory), {}
        if peft_format.OWN_METHOD in config:
            bases = {name: module.base for name, module in self.adapted.items()}
            found = read_residuals(directory, config.get(RESIDUAL), bases)
        self.fill(directory, self.from_file(saved.settings, peft_format.read_tensors(directory)))
        for name, residual in found.items():
            self.adapted[name].take(residual)

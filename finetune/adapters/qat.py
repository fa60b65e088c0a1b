"""QAT: training with the integers that the merged weight is stored in, so that merging and exporting round no more.

A projection computes with `round(W + s B A)`: the sum of the frozen weight and a low-rank product (LoRA,
arXiv:2106.09685) on a grid of integers, with a gradient straight through the rounding, as L4Q has it (Jeon et al. 2024,
arXiv:2402.04902). Steps are learnt (LSQ, arXiv:1902.08153), or fitted anew to each group's range.

On a dense base the grid is the one asked for; a base that is stored in integers keeps its own, and W is what it decodes
to. Scales are numbers of bfloat16 from the first step on, which every checkpoint holds as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from finetune.adapters.base import ADAPTERS
from finetune.adapters.integers import IntegerAdapter, check_base, split_plan, stored_at
from finetune.adapters.lora import LoRAAdapter, LoRAConfig, Size
from finetune.adapters.lora import build as build_lora
from finetune.adapters.own_format import as_saved, read_as_lora
from finetune.adapters.peft_format import OWN_METHOD, PREFIX
from finetune.adapters.peft_lora import Saved
from finetune.adapters.qat_layers import QATExperts, QATLinear, Target
from finetune.errors import ConfigError, ModelError, nearest
from finetune.quant.affine_storage import BITS, Affine, AffineConfig
from finetune.quant.base import QUANTIZERS, FrozenExperts, FrozenLinear, FrozenWeight, QuantConfig
from finetune.structure import Projection

LEARNED, FITTED = "learned", "fitted"
GRID = ("bits", "group_size", "symmetric")
"""Settings of the integers, which a base that is stored in integers has decided."""
STEP_RATE = 2.0
"""How many times as fast as the factors scales learn."""
OWN = (*GRID, "steps", "mse")
"""Settings over LoRA's."""


@dataclass
class QATConfig(LoRAConfig):
    """LoRA's settings and those of the integers. The token embedding has no form here.

    Attributes:
        bits: of a code: 2, 3, 4 or 8; None is 4, or the base's own where that is stored in integers.
        group_size: inputs of one output that share a scale: a power of two from 32 to 4096, or -1 for all of them; None
            is 64, or the base's own.
        symmetric: codes lie evenly around zero and there are no zero points; None is false, or the base's own.
        steps: `learned` trains the scales (and real zero points), `fitted` takes the range of each group at every step,
            or the base's own scales.
        mse: of a dense base, start from the range of each group that its weights err least on instead of all of it.
    """

    embeds: ClassVar[bool] = False
    trains_besides: ClassVar[bool] = False

    name: str = "qat"
    learning_rate: float = 4e-3
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    steps: str = LEARNED
    mse: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.group_size
        if self.bits is not None and self.bits not in BITS.values():
            raise ConfigError(f"adapter.bits is {self.bits}: expected {', '.join(map(str, sorted(BITS.values())))}")
        if size is not None and size != -1 and (not 32 <= size <= 4096 or size & (size - 1)):
            raise ConfigError(f"adapter.group_size is {size}: expected a power of two from 32 to 4096, or -1")
        if self.steps not in (LEARNED, FITTED):
            hint = nearest(self.steps, (LEARNED, FITTED))
            raise ConfigError(f"adapter.steps is {self.steps!r}: expected {LEARNED} or {FITTED}{hint}")
        if self.dropout:
            raise ConfigError(
                f"adapter.dropout is {self.dropout}: adapter=qat rounds W + B A as one weight, in which no input of A"
                " can be dropped: expected 0"
            )

    def read(self, directory: Path) -> Saved:
        """What a saved adapter says of itself."""
        return read_as_lora(directory, self.name, besides=OWN)

    def check_saved(self, directory: Path) -> None:
        """As LoRA's, and refuse other integers than were set here."""
        super().check_saved(directory)
        saved, default = as_saved(self, directory, OWN), type(self)()
        for key in OWN:
            mine, theirs = getattr(self, key), getattr(saved, key)
            if mine not in (getattr(default, key), theirs):
                raise ConfigError(
                    f"adapter.{key} is {mine}, but the adapter {directory} has {theirs}: leave adapter.{key} out"
                )

    def check_base(self, quant: QuantConfig) -> None:
        """Refuse a storage that is neither dense nor integers, and other integers than those of the base."""
        check_base(self.name, quant, dense=True)
        if isinstance(quant, AffineConfig):
            self.check_grid(quant, f"quant={quant.name}")

    def check_grid(self, stored: AffineConfig, where: str) -> None:
        """Refuse other integers than those that a base is stored in."""
        for key in GRID:
            mine, theirs = getattr(self, key), getattr(stored, key)
            if mine not in (None, theirs):
                raise ConfigError(f"adapter.{key} is {mine}, but {where} has {theirs}: leave adapter.{key} out")

    def settings(self) -> AffineConfig:
        """The integers of a dense base."""
        name = next(name for name, bits in BITS.items() if bits == (self.bits or 4))
        kind: Any = QUANTIZERS.type_of(name)
        return kind(group_size=self.group_size or 64, symmetric=bool(self.symmetric), zero_point="integer")


class QATAdapter(IntegerAdapter, LoRAAdapter):
    """Quantization-aware training attached to a model; see `QATConfig`."""

    config: QATConfig
    adapted: dict[str, Any]

    def __init__(self, config: QATConfig, model: nn.Module, sizes: Mapping[str, Size], plan: list[Projection]) -> None:
        """What cannot be stored in integers is left out, unless it was named.

        Raises:
            ConfigError: for a base in another storage, or other integers than the base's.
        """
        plan, self.left_out = split_plan(config, model, plan, dense=True)
        super().__init__(config, model, sizes, plan)

    def check(self) -> None:
        """The integers of the base have to be those asked for."""
        super().check()
        for p in self.projections:
            base = stored_at(self.model, p.name)
            if isinstance(base, Affine):
                self.config.check_grid(base.settings(), f"{p.name} of the base")

    def wrap(self, base: FrozenLinear, projection: Projection) -> QATLinear:
        """The rounded sum in place of a linear layer."""
        return QATLinear(base, self._target(base), **self._sizes(projection))

    def wrap_experts(self, base: FrozenExperts, projection: Projection) -> QATExperts:
        """Such a sum for each expert."""
        return QATExperts(base, self._target(base), transposed=projection.transposed, **self._sizes(projection))

    def _target(self, base: FrozenWeight) -> Target:
        settings = base.settings() if isinstance(base, Affine) else self.config.settings()
        return Target(settings, self.config.steps == LEARNED, self.config.mse)

    def learning_rate_scales(self) -> dict[str, float]:
        """Scales move by a share of themselves, and learn faster than the factors."""
        return {name: STEP_RATE for name in self._trainable if name.rpartition(".")[2] in ("step", "offset")}

    @property
    def starts_as_base(self) -> bool:
        """A dense base is rounded from the first step on, and the scales of integers to bfloat16."""
        return False

    def merged_settings(self) -> dict[str, AffineConfig]:
        """How the merged weights are stored, by the name of the projection."""
        return {name: module.target.settings for name, module in self.adapted.items()}

    def file_keys(self) -> dict[str, nn.Parameter]:
        """LoRA's names, and those of what trains of the grids."""
        keys = super().file_keys()
        for name, module in self.adapted.items():
            found = {leaf: getattr(module, leaf) for leaf in ("step", "offset")}
            keys.update({f"{PREFIX}{name}.{leaf}": p for leaf, p in found.items() if p is not None})
        return keys

    def file_config(self) -> dict[str, Any]:
        """LoRA's settings, not under PEFT's name, and those of the integers."""
        config = super().file_config()
        del config["peft_type"]
        own = asdict(self.config)
        return config | {OWN_METHOD: self.config.name} | {key: own[key] for key in OWN}

    def check_settings(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Refuse other integers, and what LoRA refuses."""
        super().check_settings(directory, saved)
        mine = self.file_config()
        for key in OWN:
            if saved.get(key) != mine[key]:
                raise ModelError(f"adapter {directory} has {key} {saved.get(key)}, but here it is {mine[key]}")


@ADAPTERS.register(QATConfig)
def build(config: QATConfig, model: nn.Module) -> QATAdapter:
    """Attach to a model, as LoRA is; a saved adapter decides the integers."""
    if config.path is not None:
        config.check_saved(Path(config.path))
        config = as_saved(config, Path(config.path), OWN)
    adapter = build_lora(config, model, QATAdapter)
    assert isinstance(adapter, QATAdapter)
    return adapter

"""How a model is cut into what trains away from home and what stands for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, nearest
from finetune.quant.base import QUANTIZERS

NONE = "none"


@dataclass
class OffsiteConfig:
    """Offsite-tuning (Xiao, Lin and Han 2023, arXiv:2302.04870).

    Attributes:
        output: the directory that `split` or `plug` writes; it must not exist.
        layers: how many blocks train at either end: the paper's two adapters.
        keep: how many blocks of the middle the emulator keeps: a number, or a share of them between 0 and 1 (1.0: all).
        distill_steps: optimizer steps in which the kept blocks are taught to stand for the whole middle; 0 for none.
        lm_weight: factor of the next-token loss in distillation.
        kd_weight: factor of the distance from the full middle's output.
        quant: how the kept blocks are stored: none (dense), or a storage format such as nf4 or int8.
        verbatim: allow that weights of the middle are shipped exactly as they are (plain layer drop does).
    """

    output: str | None = None
    layers: list[int] = field(default_factory=lambda: [2, 2])
    # OmegaConf has no type for "a count or a share".
    keep: Any = 0.5
    distill_steps: int = 200
    lm_weight: float = 1.0
    kd_weight: float = 1.0
    quant: str = NONE
    verbatim: bool = False

    def __post_init__(self) -> None:
        if len(self.layers) != 2 or min(self.layers) < 0 or not any(self.layers):
            raise ConfigError(
                f"offsite.layers is {list(self.layers)}: expected two numbers of blocks, at the start and at the end,"
                " e.g. [2,2]"
            )
        count = type(self.keep) is int and self.keep >= 1
        share = isinstance(self.keep, float) and 0 < self.keep <= 1
        if not (count or share):
            raise ConfigError(f"offsite.keep is {self.keep!r}: expected a number of blocks from 1, or a share like 0.5")
        if self.distill_steps < 0:
            raise ConfigError(f"offsite.distill_steps is {self.distill_steps}: expected 0 or more")
        for key in ("lm_weight", "kd_weight"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ConfigError(f"offsite.{key} is {getattr(self, key)}: expected 0 or more")
        if not self.lm_weight + self.kd_weight > 0:
            raise ConfigError("offsite.lm_weight and offsite.kd_weight are both 0: nothing would be learnt")
        formats = [name for name in QUANTIZERS.types() if name != "keep"]
        if self.quant not in formats:
            raise ConfigError(
                f"offsite.quant is {self.quant!r}: expected {' | '.join(formats)}{nearest(self.quant, formats)}"
            )

    def target(self) -> Path:
        """The directory to write.

        Raises:
            ConfigError: where none is named, or it exists.
        """
        if not self.output:
            raise ConfigError(
                "offsite.output is not set: expected the directory to write, e.g. offsite.output=emulator"
            )
        path = Path(self.output)
        if path.exists() or path.is_symlink():
            raise ConfigError(f"offsite.output={path} exists already: expected a directory that does not")
        return path.absolute()

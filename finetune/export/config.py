"""What is written at the end and what it has to prove."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.errors import ConfigError, nearest

AUTO = "auto"


@dataclass
class ExportConfig:
    """The exports of a run.

    Attributes:
        formats: of `safetensors`, `bnb-nf4`, `peft`, `compressed-tensors`; may be empty. `auto` writes all that the
            method can be written as.
        min_retained: least share of the improvement in held-out loss that an export must keep, in [0, 1].
        max_kl: most mean KL from the unmerged model, nats a token: the gate where the improvement is too small to
            divide by, and one more gate for formats that lose nothing but rounding.
        max_shard_gb: largest safetensors shard, in 10^9 bytes.
        rows: held-out rows that the proofs run on, at most.
    """

    # OmegaConf has no type for "a word or a list of strings".
    formats: Any = field(default_factory=list)
    min_retained: float = 0.97
    max_kl: float = 1e-2
    max_shard_gb: float = 4.0
    rows: int = 200

    def __post_init__(self) -> None:
        if not 0 <= self.min_retained <= 1:
            raise ConfigError(f"export.min_retained is {self.min_retained}: expected a share between 0 and 1")
        for key in ("max_kl", "max_shard_gb", "rows"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"export.{key} is {getattr(self, key)}: expected more than 0")
        names = isinstance(self.formats, list) and all(isinstance(name, str) for name in self.formats)
        if self.formats != AUTO and not names:
            word = self.formats if isinstance(self.formats, str) else ""
            hint = nearest(word, [AUTO]) or (f"; did you mean [{word}]?" if word else "")
            raise ConfigError(f"export.formats is {self.formats!r}: expected {AUTO} or a list of formats{hint}")
        if names and len(set(self.formats)) != len(self.formats):
            raise ConfigError(f"export.formats names a format twice: {', '.join(self.formats)}")

"""Which model is the base."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.errors import ConfigError


@dataclass
class ModelConfig:
    """The base model.

    Attributes:
        path: directory or hub id of a Hugging Face causal language model; `embedded` is the tiny model shipped inside.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python that comes with the checkpoint; off unless asked for.
        attention: `sdpa` or `eager`.
        fused: `auto` computes norms, gated MLPs and attention with our kernels where they agree with transformers' own
            (on CPUs with AVX512), `off` never.
    """

    path: str = "embedded"
    revision: str | None = None
    trust_remote_code: bool = False
    attention: str = "sdpa"
    fused: str = "auto"

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("model.path is empty: expected a directory, a hub id or `embedded`")
        if self.attention not in ("sdpa", "eager"):
            raise ConfigError(f"model.attention is {self.attention!r}: expected sdpa or eager")
        if self.fused not in ("auto", "off"):
            raise ConfigError(f"model.fused is {self.fused!r}: expected auto or off")

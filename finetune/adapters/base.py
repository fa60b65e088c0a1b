"""What every adapter offers, whatever it trains.

An adapter *attaches* to a loaded model and is from then on the only thing in it that trains.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters.mounting import Mounted
from finetune.errors import ConfigError, nearest
from finetune.quant.base import QuantConfig
from finetune.registry import Registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Choices of `adapter.dtype`."""

Originals = Callable[[Callable[[str, Tensor], None]], None]
"""Reads the weights of the base again as they were before they were quantized, one at a time: it calls what it is given
with the name that each has in the dense model and the weight itself, in the layout and dtype of that parameter."""


@dataclass
class AdapterConfig:
    """What is trained. Sub-classes are registered in `ADAPTERS`, one a method.

    Attributes:
        name: the method.
        path: directory of a saved adapter (ours or PEFT's) to start from; null starts fresh.
        dtype: of the trainable weights and their gradients: fp32 or bf16.
        train_also: full modules trained beside the adapter, by the last part of their name: [lm_head, embed_tokens].
        allow_other_quant: accept a saved adapter that was trained on the same weights quantized otherwise.
        learning_rate: the peak that suits the method on a base of hidden size 256, where `train.learning_rate` names
            none; wider bases learn at 256 / hidden size of it (`by_width`), some methods beside a head made for the
            task at a share of it (`beside_head`). It belongs to the training and is not saved.
    """

    by_width: ClassVar[bool] = True
    """Whether the rate falls with the width of the base, as it must for weights of projections."""
    beside_head: ClassVar[float] = 1.0
    """Share of the rate beside a head made for the task."""

    name: str = "base"
    path: str | None = None
    dtype: str = "fp32"
    train_also: list[str] = field(default_factory=list)
    allow_other_quant: bool = False
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ConfigError(f"adapter.learning_rate is {self.learning_rate}: expected more than 0")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"adapter.dtype is {self.dtype!r}: expected {' | '.join(DTYPES)}{nearest(self.dtype, DTYPES)}"
            )
        if isinstance(self.train_also, str) or not all(isinstance(name, str) and name for name in self.train_also):
            raise ConfigError(
                f"adapter.train_also is {self.train_also!r}: expected a list of module names, e.g. [lm_head]"
            )

    def starts(self) -> list[AdapterConfig]:
        """What starts from a saved adapter: itself where `path` is set; for a method made of others, those that do."""
        return [] if self.path is None else [self]

    def check_saved(self, directory: Path) -> None:
        """What the method can say against the adapter in `directory` (that of `path`) before any model is loaded.

        Raises:
            UserError: when it cannot be read, is of another method or contradicts these settings.
        """

    def check_base(self, quant: QuantConfig) -> None:
        """What the method can say against the storage of its base before any model is loaded; most take every one.

        Args:
            quant: as configured; under `keep` the checkpoint decides, and it is `attach` that refuses.

        Raises:
            ConfigError: naming the storages that the method takes.
        """

    def check_stored(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """What the method can say for certain against its settings by the base's checkpoint alone; most say nothing.

        What a checkpoint holds is not what the model will have: tensors may be packed, stacked or joined while they
        are read. The last word is `check`'s, on a model without weights; this one is there to be early.

        Args:
            shapes: of the stored tensors, by name.

        Raises:
            UserError: when no model that reads such tensors can be adapted this way.
        """

    def read_tokenizer(self, tokenizer: Any) -> None:
        """Remember what the settings need of the base's tokenizer, before they are attached; most need nothing.

        Raises:
            ConfigError: for a setting that the tokenizer can make nothing of.
        """


ADAPTERS: Registry[AdapterConfig] = Registry("adapter", "finetune.adapters")
"""`ADAPTERS.build(config, model)` attaches to the model in place and returns an `Adapter`."""


class Learner(ABC):
    """As much of an adapter as the training loop needs: a model, and what trains in it."""

    config: AdapterConfig
    model: nn.Module
    copies: Mapping[str, Any] = {}
    """Modules that train whole (`full_copy.FullCopy`), by their names in the model."""
    task_head: Sequence[str] = ()
    """Modules that train whole, made for the task: they start from nothing, and learn at a rate of their own."""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """Every tensor that trains, by its full name in the model; nothing else requires a gradient."""

    def learning_rate_scales(self) -> dict[str, float]:
        """Factors on the learning rate, by names of `trainable()`; what is not among them learns at the plain rate."""
        return {}

    @property
    def virtual_tokens(self) -> int:
        """How many positions of the model's context it takes up before the first token of every row."""
        return 0

    def training_obstacle(self, *, gradient_checkpointing: bool, packing: bool) -> str:
        """Why the method cannot train this model in such a way, naming the setting; empty where it can.

        docs/methods.md lists every pair that is refused, with the reason.
        """
        return ""


class Adapter(Learner):
    """An attached adapter. Held beside the model, never inside it."""

    members: Mapping[str, Adapter] = {}
    """What an adapter is made of, by the names of their directories inside its own."""

    @property
    def note(self) -> str:
        """A line on what trains, where that is not plain from the configuration; empty for none."""
        return ""

    @property
    def in_peft(self) -> bool:
        """Whether PEFT has the method, so that stock PEFT opens what `save` writes."""
        return False

    @property
    def peft_obstacle(self) -> str:
        """Why `in_peft` is false, as a sentence; empty where it is true."""
        return "" if self.in_peft else "PEFT has no such method"

    def initialise(self, originals: Originals | None = None) -> None:
        """Find the initial values that depend on the base's weights; `attach` calls it once, where no saved adapter is
        loaded. Most methods have none.

        Args:
            originals: the base before it was quantized; None where it cannot be had, or is what is stored.
        """
        return

    @property
    def keeps_start(self) -> bool:
        """Whether it computes with more than the stored base and `trainable()`: values found by `initialise` that do
        not train. A resumed run needs them bit for bit, so the run saves the adapter as it starts."""
        return False

    @property
    def starts_as_base(self) -> bool:
        """Whether the model, before the first step, computes what the base computes, bit for bit."""
        return True

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Within it the model computes exactly what the base computes."""

    def places(self) -> Mapping[str, Mounted]:
        """What it puts into the model, by the names of what that stands for; empty for an adapter that stands alone."""
        return {}

    def take_over(self, name: str, copy: Any) -> None:
        """Train another adapter's copy of a module that trains whole, in place of the own one.

        Raises:
            KeyError: where it trains no such module.
        """
        raise KeyError(name)

    @abstractmethod
    def mount(self) -> None:
        """Put what trains into the model, where `unmount` had taken it out."""

    @abstractmethod
    def unmount(self) -> None:
        """Take what trains out of the model, which then *is* the base: modules, parameter names and state dict."""

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Within it the adapter is unmounted."""
        self.unmount()
        try:
            yield
        finally:
            self.mount()

    @property
    @abstractmethod
    def mergeable(self) -> bool:
        """Whether the adapted model can be written as plain weights of the base's own shape."""

    @property
    def obstacle(self) -> str:
        """Why `mergeable` is false, in words that follow "because"; empty where it is true."""
        return "" if self.mergeable else "it computes something that is no weight of the base"

    @abstractmethod
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """For each projection (or full module weight) that the adapter changes: its name in the model as it was before
        attaching (e.g. `model.layers.0.self_attn.q_proj.weight`; `...experts.gate_up_proj` for a stack) and the merged
        weight in float32, decoded from what is stored, in the layout of the original parameter. One at a time, so that
        memory holds one."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the adapter in PEFT's layout and names wherever PEFT has the method."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Fill the attached tensors from a saved adapter of the same method and shape.

        Raises:
            ModelError: naming the missing, unexpected or mis-shaped keys.
        """

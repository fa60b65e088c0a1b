"""What every pruner offers that takes whole parts out of a model, so that a smaller one of its family is left.

A `Cut` stands in the same registry as the pruners that set weights to zero, because a user makes one choice
(`pruner=...`), but it is asked other things: it sees blocks, not matrices. The driver has each block cut before
anything else is done to it (quant/driver.py), on what the blocks before it put out as they are by then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.quant.pruners.base import PrunerConfig
from finetune.structure.base import Structure
from finetune.structure.widths import Build

if TYPE_CHECKING:
    from finetune.quant.driver import Driver

DEFAULT_SHARE = 0.25
Run = Callable[[nn.Module], Iterator[Tensor]]
"""`run(block)` runs a block, or one that takes its place, over all calibration batches, one a step."""
Told = Callable[[str, int, int], None]
"""`told(what, step, of)`: how far it is, in words; what it raises ends the work."""


@dataclass
class CutConfig(PrunerConfig):
    """How much of a model goes.

    Attributes:
        sparsity: share of the parts (channels, heads, blocks) that is taken out; never more than that.
    """

    cuts: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True

    sparsity: float = DEFAULT_SHARE

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ConfigError(f"pruner.sparsity is {self.sparsity}: expected a share above 0 and below 1")


@dataclass
class Summary:
    """What a cut did.

    Attributes:
        before, after: of each entry of the configuration that changed, as plain values.
        parts: for each projection, or block, that lost something: figures of the method.
    """

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)


class Cut(ABC):
    """A smaller model in the making. Used once.

    Attributes:
        original, config: of the large and of the small model, of transformers; once `plan` was called.
        structure: of the small model, its blocks and projections called what they are called in the large one.
        summary: what there is to report.
        told: called once a block was cut, or looked at.
    """

    original: Any
    config: Any
    structure: Structure

    def __init__(self) -> None:
        self.summary = Summary()
        self.told: Told = lambda what, step, of: None

    @abstractmethod
    def plan(self, model: nn.Module, build: Build) -> None:
        """Decide how small the model becomes.

        Args:
            model: of transformers, on the meta device; it is the cut's from now on.
            build: makes the model of a configuration, on the meta device.

        Raises:
            ConfigError: for a share that takes nothing or everything.
            ModelError: where there is no configuration for such a model.
        """

    @abstractmethod
    def begin(self, driver: Driver) -> None:
        """See what has to be seen of the whole model before its first block is cut."""

    @abstractmethod
    def block(self, driver: Driver, name: str, run: Run) -> None:
        """Put a smaller block in the place of one.

        Raises:
            ModelError: where the small one does not compute what the large one does without the parts that go.
        """

    @abstractmethod
    def lay_out(self, model: nn.Module, name: str) -> None:
        """Put the smaller block, without weights, in the place of one that an earlier run has finished."""

    def finish(self, model: nn.Module) -> dict[str, str]:
        """Make the model one of the small configuration; by the old names of blocks, the new ones where they differ."""
        before, after = (config.get_text_config().to_dict() for config in (self.original, self.config))
        for key, value in after.items():
            if before.get(key) != value:
                self.summary.before[key], self.summary.after[key] = before.get(key), value
        self.config._name_or_path = model.config._name_or_path  # type: ignore[union-attr]
        model.config = self.config  # type: ignore[assignment]
        return {}


def put(model: nn.Module, name: str, block: nn.Module) -> None:
    """Exchange a block, in place, so that the order of modules stays."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, block)


def part_of(share: float, number: int) -> int:
    """How many of so many go: never more than was asked for."""
    return int(number * share + 1e-6)

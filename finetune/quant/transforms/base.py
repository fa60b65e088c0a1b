"""What every transform offers: a block of a dense model is changed so that it computes the same and rounds better.

A transform divides a tensor by a factor for each of its channels and multiplies the columns of whatever reads it by the
same factor. It is folded into weights that exist already, so that the checkpoint stays a plain one: the norm or the
projection that gives the tensor, and the projections that read it. Which those are is found by `search.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from finetune.quant.base import QuantConfig
from finetune.quant.rounders.base import Rounder
from finetune.quant.transforms.search import Scaling, Search
from finetune.registry import Registry
from finetune.structure.base import Projection

if TYPE_CHECKING:
    from finetune.quant.driver import Driver


@dataclass
class TransformConfig:
    """What is done to a dense model before it is quantized. Sub-classes are registered in `TRANSFORMS`.

    Attributes:
        needs_inputs: whether it cannot work without calibration data.
    """

    needs_inputs: ClassVar[bool] = False

    name: str = "base"


TRANSFORMS: Registry[TransformConfig] = Registry("transform", "finetune.quant.transforms")
"""`TRANSFORMS.build(config)` returns a `Transform`, or None where nothing is to be done."""

Forward = Callable[[], Iterator[Tensor]]
"""Runs a block over all calibration batches, one a step."""


@dataclass
class Summary:
    """What a transform did to a model.

    Attributes:
        folded: for each tensor that was scaled, the name of what gives it, with figures of the method.
        notes: what could not be scaled, and why.
    """

    folded: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Transform(ABC):
    """Changes one block after the other."""

    def __init__(self) -> None:
        self.summary = Summary()
        self._search: Search | None = None

    def scalings(self, driver: Driver, projections: list[Projection], forward: Forward) -> list[Scaling]:
        """What can be scaled in the block of some projections; what cannot, and why, is noted."""
        if self._search is None:
            self._search = Search(driver.model, driver.structure)
        number = projections[0].block
        assert number is not None
        said = len(self._search.notes)
        found = self._search.scalings(driver.structure.blocks[number], lambda: next(forward()))
        self.summary.notes += self._search.notes[said:]
        return found

    @abstractmethod
    def block(self, driver: Driver, projections: list[Projection], forward: Forward) -> None:
        """Change one block in place; its output stays as it was, but for rounding.

        Args:
            driver: the run that this is part of: its model, structure and storage format. The projections of the model
                are dense frozen modules, or quantized ones in blocks before this one.
            projections: of the block, those that will be quantized.
            forward: runs the block as it is now.
        """

    def rounder(self, rounder: Rounder, quant: QuantConfig, grams: Sequence[Tensor | None]) -> Rounder:
        """What chooses the codes of one weight; by default the rounder that was asked for.

        Args:
            grams: as `rounders.base.apply` takes them.
        """
        return rounder

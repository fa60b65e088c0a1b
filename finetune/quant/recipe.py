"""What is done to each block of a model on its way into a storage format."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune.quant.base import QuantConfig
from finetune.quant.distill import Distiller
from finetune.quant.pruners.base import Pruner
from finetune.quant.pruners.cut import Cut
from finetune.quant.rounders.base import Rounder
from finetune.quant.rounders.rtn import RTN
from finetune.quant.transforms.base import Transform


@dataclass(frozen=True)
class Recipe:
    """The storage format, and who works on a block, in the order of their turns: cut, transform, pruner with rounder,
    distiller. One that looks at inputs needs calibration data.

    Attributes:
        quant: the storage format of projections.
        rounder: chooses the codes.
        cut: makes each block smaller before anything else is done to it. Dense storage without a pruner then leaves the
            rest as it is.
        transform: changes each block before it is quantized.
        pruner: sets weights to zero before, or while, codes are chosen.
        distiller: trains each block once it is quantized.
    """

    quant: QuantConfig
    rounder: Rounder = field(default_factory=RTN)
    cut: Cut | None = None
    transform: Transform | None = None
    pruner: Pruner | None = None
    distiller: Distiller | None = None

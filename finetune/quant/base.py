"""What every frozen weight offers, however it is stored.

Shape suffixes: O out features, I in features, E experts, B any leading dimensions of the input.

Codes and scales are `nn.Parameter(requires_grad=False)` in their storage dtype: FSDP2 shards only
parameters, and DDP would broadcast buffers on every step. `.to(dtype)` leaves them alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from finetune.kernels.operand import Operand
from finetune.registry import Registry


@dataclass
class QuantConfig:
    """How the frozen base is stored. Sub-classes are registered in `QUANTIZERS`, one a storage format.

    Attributes:
        at_will: names of settings that say how to compute, not what is stored; a stored checkpoint leaves them free.
        rounds: whether there are codes to choose; false where weights are stored as they are.
    """

    at_will: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[bool] = True

    name: str = "base"

    @property
    def needs_inputs(self) -> bool:
        """Whether a dense weight cannot be stored so before calibration has seen what it multiplies."""
        return False

    @property
    def clipped_bits(self) -> int:
        """Bits of inputs whose static range is to be searched (quant/token_clip.py); 0 where none is."""
        return 0


QUANTIZERS: Registry[QuantConfig] = Registry("quant", "finetune.quant")
"""`QUANTIZERS.build(config, out_features, in_features, bias=..., dtype=..., device=...)` returns an empty
`FrozenLinear`; with `experts=E` an empty `FrozenExperts`."""


class FrozenWeight(nn.Module, ABC):
    """A frozen matrix, or a stack of them, in some storage format.

    Attributes:
        pruned: weights that are zero are to stay zero in whatever is made of this one (`finetune.quant.pruned`).
    """

    pruned: bool = False

    out_features: int
    in_features: int

    @abstractmethod
    def store(self, weight: Tensor) -> None:
        """Quantize a dense weight ([O, I]; experts [E, O, I]) into this module's storage, in place, on its device."""

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, scales included, bias excluded."""

    def cleared(self) -> Tensor:
        """Where stored weights are exactly zero, bool, laid out as `dequantize` does."""
        return self.dequantize(torch.float32) == 0  # type: ignore[operator]

    def uncoupled(self) -> AbstractContextManager[object]:
        """Within it a row of the input takes no part in what another row gives; a format whose rows do says how.

        For checks that ask whether something else in the model lets rows mix.
        """
        return nullcontext()

    def bytes(self) -> int:
        """Bytes that the parameters of this module hold, bias included."""
        return sum(p.numel() * p.element_size() for p in self.parameters(recurse=False))


class FrozenLinear(FrozenWeight):
    """A frozen linear layer: y_BO = x_BI @ w_OI.T + bias_O.

    The gradient flows to `x` only. Every storage format honours this contract, so that an adapter never
    knows how its base is stored.
    """

    bias: nn.Parameter | None

    @abstractmethod
    def forward(self, x_BI: Tensor) -> Tensor:
        """Multiply in the dtype of `x_BI`; same bits whatever the grad mode."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The stored weight w_OI, decoded in float32 and cast to `dtype`."""

    @abstractmethod
    def operand(self) -> Operand:
        """The stored weight, without the bias, as operators take it that fuse something with the product."""

    @abstractmethod
    def requantize(self, w_OI: Tensor) -> FrozenLinear:
        """A new module of the same format and settings that holds `w_OI` and this module's bias.

        Where `w_OI` equals `dequantize(torch.float32)` bit for bit, the stored codes and scales are kept bit for bit.
        """


class FrozenExperts(FrozenWeight):
    """A frozen stack of expert projections w_EOI that stands in for a 3-D parameter of a mixture-of-experts module.

    `experts[e]` gives the dense [O, I] (or [I, O] where the family stores it transposed) weight of one expert, which is
    how the eager expert loop of transformers reads such a parameter.
    """

    num_experts: int

    @abstractmethod
    def __getitem__(self, expert: int) -> Tensor:
        """The decoded weight of one expert, in the layout and the compute dtype of the parameter it stands for.

        It may be an operand that torch's functions take for that tensor, and that keeps the packed weight for the
        backward instead of the dense one.
        """

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole stack in the layout of the parameter it stands for."""

    @abstractmethod
    def requantize(self, w_EOI: Tensor) -> FrozenExperts:
        """A new module of the same format and settings that holds the given stack."""

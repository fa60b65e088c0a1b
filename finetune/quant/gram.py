"""What the inputs of a projection look like, as far as rounders and formats ask: second moment, largest magnitudes.

Shape suffixes: N samples, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels.gram import add_gram_, mirror_


class Gram:
    """Sums x x^T over inputs in float32, whatever their dtype.

    Attributes:
        samples: how many inputs were seen.
        limit: magnitude that the inputs are to be represented up to, a float32 scalar; the largest one as long as none
            is searched. None before the first input.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.limit: Tensor | None = None
        self._largest: list[Tensor] = []
        self._sum_II: Tensor | None = None
        self._mirrored = True

    @property
    def matrix_II(self) -> Tensor | None:
        """The sum; None before the first. No copy: what is taken in later is added to it."""
        if not self._mirrored and self._sum_II is not None:
            mirror_(self._sum_II)
            self._mirrored = True
        return self._sum_II

    def add(self, x: Tensor) -> None:
        """Take some inputs in, [.., I]."""
        x_NI = x.detach().reshape(-1, x.shape[-1])
        if not len(x_NI):
            return
        self.samples += len(x_NI)
        self._largest.append(torch.maximum(x_NI.amax(1), -x_NI.amin(1)).float())
        largest = self._largest[-1].amax()
        self.limit = largest if self.limit is None else torch.maximum(self.limit, largest)
        if self._sum_II is None:
            self._sum_II = x_NI.new_zeros(x_NI.shape[1], x_NI.shape[1], dtype=torch.float32)
        add_gram_(self._sum_II, x_NI)
        self._mirrored = False

    def largest_N(self) -> Tensor:
        """The largest magnitude of each input, float32."""
        return torch.cat(self._largest)

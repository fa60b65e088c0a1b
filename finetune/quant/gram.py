"""What the inputs of a projection look like, as far as rounders and formats ask: second moment, largest magnitudes.

Shape suffixes: N samples, I in features.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Gram:
    """Sums x x^T over inputs in float32, whatever their dtype.

    Attributes:
        samples: how many inputs were seen.
        matrix_II: the sum; None before the first.
        limit: magnitude that the inputs are to be represented up to, a float32 scalar; the largest one as long as none
            is searched. None before the first input.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.matrix_II: Tensor | None = None
        self.limit: Tensor | None = None
        self._largest: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Take some inputs in, [.., I]."""
        x_NI = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x_NI):
            return
        self.samples += len(x_NI)
        self._largest.append(torch.maximum(x_NI.amax(1), -x_NI.amin(1)))
        largest = self._largest[-1].amax()
        self.limit = largest if self.limit is None else torch.maximum(self.limit, largest)
        if self.matrix_II is None:
            self.matrix_II = x_NI.T @ x_NI
        else:
            self.matrix_II.addmm_(x_NI.T, x_NI)

    def largest_N(self) -> Tensor:
        """The largest magnitude of each input, float32."""
        return torch.cat(self._largest)

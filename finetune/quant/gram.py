"""What the inputs of a projection look like, as far as rounders and formats ask: second moment, largest magnitude.

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
        largest: magnitude among the inputs, float32; None before the first.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.matrix_II: Tensor | None = None
        self.largest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take some inputs in, [.., I]."""
        x_NI = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x_NI):
            return
        self.samples += len(x_NI)
        largest = x_NI.abs().amax()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if self.matrix_II is None:
            self.matrix_II = x_NI.T @ x_NI
        else:
            self.matrix_II.addmm_(x_NI.T, x_NI)

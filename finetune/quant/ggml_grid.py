"""The grid of llama.cpp's blocks, and the rules by which ggml rounds onto it.

Shape suffixes: O out features (or any leading dimensions), I in features, G blocks of a row, C a run of columns.

The rules are those of `quantize_row_q4_0_ref` and its kin (ggml-quants.c), so that bytes are those of ggml and of the
gguf package: in float32, with the scale as it is before float16 rounds it, although decoding multiplies by the rounded
one.

- q4_0, q5_0: the weight furthest from zero is the code 0 exactly, so d has its sign turned; the other side ends a step
  earlier. q = trunc(w / d + 2^(bits-1) + .5).
- q4_1, q5_1: d = (max - min) / (2^bits - 1); q = trunc((w - min) / d + .5).
- q8_0: d = max|w| / 127; q = w / d, half way away from zero.

`/ d` is a product with 1 / d, which is 0 where d is. So it is here where 1 / d leaves float32 (weights below 1e-37): d
is 0 in float16 by then, and ggml turns what is no number into codes as its compiler happens to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from finetune.kernels import ggml


@dataclass(frozen=True)
class GgmlGrid:
    """Where the codes of a weight lie.

    Attributes:
        scale_OG: float16, of either sign.
        least_OG: float16, the value of code 0 of q4_1 and q5_1; else None.
        inverse_OG, start_OG: float32, 1 / d and m as they are before float16 rounds them; what rounding goes by.
        kind: q4_0 | q4_1 | q5_0 | q5_1 | q8_0.
    """

    scale_OG: Tensor
    least_OG: Tensor | None
    inverse_OG: Tensor
    start_OG: Tensor | None
    kind: str

    @classmethod
    def fit(cls, w_OI: Tensor, kind: str) -> Self:
        """The grid that ggml would choose. A block that holds NaN or infinity has a scale that is not finite either."""
        layout, w_OI = ggml.LAYOUTS[kind], w_OI.float()
        short = -w_OI.shape[-1] % ggml.BLOCK
        if short:  # by what is there already, which moves neither end
            w_OI = torch.cat([w_OI, w_OI[..., -1:].expand(*w_OI.shape[:-1], short)], dim=-1)
        w_OGB = w_OI.unflatten(-1, (-1, ggml.BLOCK))
        start_OG = w_OGB.amin(dim=-1) if layout.least else None
        if start_OG is not None:
            span_OG, steps = w_OGB.amax(dim=-1) - start_OG, 2 * layout.half - 1
        elif layout.bits == 8:
            span_OG, steps = w_OGB.abs().amax(dim=-1), layout.half - 1
        else:
            furthest_OG1 = w_OGB.abs().argmax(dim=-1, keepdim=True)  # the first of them, whose sign decides
            span_OG, steps = w_OGB.gather(-1, furthest_OG1).squeeze(-1), -layout.half
        # By a tensor on the device: a plain number becomes a product with its reciprocal on CUDA.
        scale_OG = span_OG / torch.tensor(float(steps), device=span_OG.device)
        inverse_OG = scale_OG.reciprocal()
        inverse_OG = torch.where((scale_OG == 0) | inverse_OG.isinf(), 0, inverse_OG)
        least_OG = None if start_OG is None else start_OG.to(torch.float16)
        return cls(scale_OG.to(torch.float16), least_OG, inverse_OG, start_OG, kind)

    def part(self, rows: int | slice) -> Self:
        """The grid of some of the leading rows, or of one expert of a stack."""
        return replace(
            self,
            scale_OG=self.scale_OG[rows],
            least_OG=None if self.least_OG is None else self.least_OG[rows],
            inverse_OG=self.inverse_OG[rows],
            start_OG=None if self.start_OG is None else self.start_OG[rows],
        )

    def expert(self, number: int) -> Self:
        """The grid of one expert of a stack."""
        return self.part(number)

    def round_columns(self, w_OC: Tensor, first: int) -> Tensor:
        """The codes that ggml gives the columns from `first` on, uint8 [.., O, C]; at the ends those of the ends."""
        layout, count = ggml.LAYOUTS[self.kind], w_OC.shape[-1]
        value_OC = w_OC.float()
        if self.start_OG is not None:
            value_OC = value_OC - ggml.spread(self.start_OG, first, count)
        value_OC = value_OC * ggml.spread(self.inverse_OG, first, count)
        if layout.bits == 8:
            size_OC = value_OC.abs().clamp_(max=layout.half)
            whole_OC = size_OC.floor()
            whole_OC += (2 * (size_OC - whole_OC)).floor_()
            rounded_OC = whole_OC.mul_(value_OC.sign()).clamp_(1 - layout.half, layout.half - 1).add_(layout.half)
        else:
            offset = 0.5 if layout.least else layout.half + 0.5
            rounded_OC = value_OC.add_(offset).trunc_().clamp_(0, 2 * layout.half - 1)
        return rounded_OC.to(torch.uint8)

    def decode(self, codes_OC: Tensor, first: int = 0) -> Tensor:
        """The float32 weights of codes of the columns from `first` on."""
        count = codes_OC.shape[-1]
        least_OC = None if self.least_OG is None else ggml.spread(self.least_OG, first, count)
        return ggml.decode(codes_OC, ggml.spread(self.scale_OG, first, count), least_OC, self.kind)

    def pack(self, codes_OI: Tensor) -> Tensor:
        """Codes of whole rows as blocks, uint8 [.., O, P]."""
        return ggml.pack(codes_OI, self.scale_OG, self.least_OG, self.kind)

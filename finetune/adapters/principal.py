"""The largest singular vectors of a weight: what PiSSA and LoftQ start from.

The randomized form is Halko, Martinsson and Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1: the range of W is
found from its products with a few random vectors, sharpened by power iterations, and the small rest decomposed exactly.

Shape suffixes: O out features, I in features, R rank, Q columns of the sketch; `...` a stack of experts or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 10
"""Columns of the sketch beyond the rank; Halko et al., section 4.2, say 5 to 10."""


def principal(w_OI: Tensor, rank: int, niter: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors whose product is the best approximation of a weight by that rank, each with the roots of the values.

    Args:
        w_OI: [..., O, I] in float32.
        rank: at most the shorter side.
        niter: power iterations of the randomized decomposition; None for the exact one, which takes far longer.
        generator: of the CPU; the sketch is drawn there, so that a seed gives the same one on every device.

    Returns:
        a_RI and b_OR with `b @ a` near `w`.
    """
    width = min(rank + OVERSAMPLING, *w_OI.shape[-2:])
    if niter is None or width == min(w_OI.shape[-2:]):
        u_OR, s_R, v_RI = torch.linalg.svd(w_OI, full_matrices=False)
    else:
        sketch_IQ = torch.randn(w_OI.shape[-1], width, generator=generator).to(w_OI)
        range_OQ = torch.linalg.qr(w_OI @ sketch_IQ).Q
        for _ in range(niter):
            range_OQ = torch.linalg.qr(w_OI @ torch.linalg.qr(w_OI.mT @ range_OQ).Q).Q
        small_QR, s_R, v_RI = torch.linalg.svd(range_OQ.mT @ w_OI, full_matrices=False)
        u_OR = range_OQ @ small_QR
    root_R = s_R[..., :rank].sqrt()
    return root_R[..., None] * v_RI[..., :rank, :], u_OR[..., :rank] * root_R[..., None, :]

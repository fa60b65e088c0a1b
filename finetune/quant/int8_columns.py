"""What int8 codes lose of columns whose weights are small in their rows.

LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) multiplies the columns of outlying inputs by weights in 16 bits;
bitsandbytes by the decoded codes of a row, whose step is that of its largest weight. Where training, or a scaled norm,
made an input a hundred times as large as others, the weights that read it are as much smaller, and the codes hold
nothing of them. What is lost of such columns is kept beside the codes, which stay those of bitsandbytes.

Shape suffixes: O out features, I in features, K columns that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.kernels import int8

MOST = 16
"""One column of so many is kept at the most: where more are small, a row has too large a weight, and wants groups."""


def small_columns(parts: Sequence[Tensor], absmax_O: Tensor, share: float) -> Tensor | None:
    """The columns of which codes lose more than a share, int32 [K]; None for none, or for too many.

    Args:
        parts: the weight [O, I], some rows at a time.
        absmax_O: float32, as stored.
        share: of a column's length, in (0, 1).
    """
    squares_I = torch.stack([part.float().square().sum(0) for part in parts]).sum(0)
    # Rounding loses a twelfth of a squared step of a weight on average: it tells which columns are worth decoding.
    likely_I = (absmax_O.double() / int8.LEVELS).square().sum() / 12 > (share / 2) ** 2 * squares_I.double()
    columns_K = (likely_I & (squares_I > 0)).nonzero().view(-1)
    if not len(columns_K):
        return None
    lost_K = torch.zeros_like(squares_I[columns_K])
    for part, absmax_R in zip(parts, absmax_O.split([len(part) for part in parts]), strict=True):
        lost_K += _lost(part.index_select(1, columns_K), absmax_R).square().sum(0)
    columns_K = columns_K[lost_K > share**2 * squares_I[columns_K]]
    return columns_K.int() if 0 < len(columns_K) <= len(squares_I) // MOST else None


def _lost(w_RK: Tensor, absmax_R: Tensor) -> Tensor:
    """What the nearest codes lose of some weights, float32."""
    step_R = (absmax_R / int8.LEVELS).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    value_RK = w_RK.to(torch.float16).float()
    return w_RK.float() - (value_RK / step_R).round() * step_R

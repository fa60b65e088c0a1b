"""Rounding onto a 4-bit codebook so that the error of one column is made good by the columns after it.

GPTQ (Frantar et al. 2022, arXiv:2210.17323), section 3, with two differences: the grid is a codebook (NF4, FP4) and not
integers, and it is fixed in advance: the codes are chosen for the absmax that is *stored*, after its own double
quantization. With a fixed grid, columns may be taken in any order; those with the most energy come first (act-order).

Shape suffixes: O out features, I in features, G blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.kernels import codebook as books
from finetune.kernels import reference
from finetune.quant.codebook4 import Codebook4Linear

COLUMNS = 128
"""Columns whose corrections are applied one by one; the rest of the matrix gets them in one product (section 3.2)."""
DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean diagonal added to it until the Cholesky factor exists."""


@dataclass(frozen=True)
class Compensated:
    """What compensation did to one weight.

    Attributes:
        error_rtn, error: tr((W - Q) H (W - Q)^T) / tr(W H W^T) of rounding to nearest, and of what is stored now.
        damping: the share that was needed; None where rounding to nearest was kept.
    """

    error_rtn: float
    error: float
    damping: float | None


@torch.no_grad()
def compensate(linear: Codebook4Linear, w_OI: Tensor, gram_II: Tensor) -> Compensated:
    """Choose codes of `linear` for `w_OI` anew, given what its inputs look like; absmax stays as it is stored.

    `linear` has to hold `w_OI` rounded to nearest (`store`). The result is kept only where its error on the given
    inputs is smaller.

    Args:
        linear: in place.
        w_OI: what it is to hold, float32, on the CPU or an accelerator.
        gram_II: sum of x x^T over calibration inputs, float32 or float64, same device.
    """
    w_OI, gram_II = w_OI.float(), gram_II.float()
    rounded = linear.dequantize(torch.float32)
    energy = _error(w_OI, gram_II)
    before = _error(w_OI - rounded, gram_II)
    if not energy > 0:
        return Compensated(0.0, 0.0, None)
    # An input that is always zero teaches nothing about its column; any positive curvature leaves it to be rounded.
    gram_II = gram_II + torch.diag((gram_II.diagonal() == 0).float())
    order_I = gram_II.diagonal().argsort(descending=True, stable=True)
    factor_II, damping = _inverse_factor(gram_II[order_I][:, order_I])
    if factor_II is None:
        return Compensated(before / energy, before / energy, None)
    scale_OI = _scales(linear)
    codes_OI = torch.empty_like(w_OI, dtype=torch.uint8)
    codes_OI[:, order_I] = _codes(w_OI[:, order_I], scale_OI[:, order_I], factor_II, linear.codebook)
    stored = linear.weight
    linear.weight = nn.Parameter(_pack(codes_OI, linear.codebook), requires_grad=False)
    after = _error(w_OI - linear.dequantize(torch.float32), gram_II)
    if not after < before:
        linear.weight = stored
        return Compensated(before / energy, before / energy, None)
    return Compensated(before / energy, after / energy, damping)


def _error(delta_OI: Tensor, gram_II: Tensor) -> float:
    return float(((delta_OI @ gram_II) * delta_OI).sum(dtype=torch.float64))


def _inverse_factor(gram_II: Tensor) -> tuple[Tensor | None, float | None]:
    """The upper Cholesky factor of the inverse, and the damping that it needed; (None, None) where none exists."""
    mean = gram_II.diagonal().mean()
    for damping in DAMPING:
        damped = gram_II + torch.eye(len(gram_II), device=gram_II.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return factor, damping
    return None, None


def _scales(linear: Codebook4Linear) -> Tensor:
    """The stored absmax of every element, decoded: blocks run over the flattened weight."""
    absmax_G = reference.decode_absmax(linear.absmax, linear.nested_absmax, linear.nested_offset)
    count = linear.out_features * linear.in_features
    return absmax_G.repeat_interleave(linear.block_size)[:count].view(linear.out_features, linear.in_features)


def _codes(w_OI: Tensor, scale_OI: Tensor, factor_II: Tensor, codebook: str) -> Tensor:
    """Code after code in the order of the columns, each one's error spread over the columns still to come."""
    table = books.table(codebook, w_OI.device)
    sorted_values, order = table.sort(stable=True)
    middles = books.midpoints(sorted_values)
    w_OI = w_OI.clone()
    inverse_OI = scale_OI.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    codes_OI = torch.empty_like(w_OI, dtype=torch.uint8)
    for start in range(0, w_OI.shape[1], COLUMNS):
        end = min(start + COLUMNS, w_OI.shape[1])
        errors = torch.empty_like(w_OI[:, start:end])
        for column in range(start, end):
            value_O = w_OI[:, column]
            # The lower neighbour wins a tie, as in rounding to nearest.
            code_O = order[torch.bucketize(value_O * inverse_OI[:, column], middles)]
            codes_OI[:, column] = code_O.to(torch.uint8)
            error_O = (value_O - table[code_O] * scale_OI[:, column]) / factor_II[column, column]
            w_OI[:, column + 1 : end] -= torch.outer(error_O, factor_II[column, column + 1 : end])
            errors[:, column - start] = error_O
        w_OI[:, end:] -= errors @ factor_II[start:end, end:]
    return codes_OI


def _pack(codes_OI: Tensor, codebook: str) -> Tensor:
    """Two codes a byte, the first in the high nibble; an odd last one is paired with the code of zero."""
    flat = codes_OI.flatten()
    if flat.numel() % 2:
        zero = int((books.table(codebook, flat.device) == 0).nonzero()[0])
        flat = torch.nn.functional.pad(flat, (0, 1), value=zero)
    return (flat[::2] << 4 | flat[1::2]).unsqueeze(1)

"""Fake quantization: a weight rounded onto an affine grid and decoded again, with a gradient straight through.

Forward, the values are those that kernels/affine.py decodes from the nearest codes, bit for bit. Backward, rounding is
taken for the identity (Bengio et al. 2013, arXiv:1308.3432): the gradient reaches a weight whose code was not clipped,
and is zero where it was. The gradient of a step is LSQ's (Esser et al. 2020, arXiv:1902.08153, equation 3): `q - w / s`
where the code was not clipped and the clipped code where it was, q counted from the code of zero; summed over the
weights under the step and multiplied by `1 / sqrt(n Qp)` (section 2.2), n the size of a group and Qp = 2^(bits-1) - 1.
A real zero point gets the gradient of the clipped weights, as in LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576, section
3.1), with the same factor.

Shape suffixes: O out features (or any leading dimensions), I in features, G groups of a row, S inputs of a group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def fake_quantize(w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The float32 values [.., O, I] that the codes nearest to a weight stand for.

    Args:
        w_OI: float32.
        scale_OG: float32, more than 0.
        zero_OG: None (symmetric), uint8 (integer zero points) or float32 (real ones), as in kernels/affine.py.
        group_size: inputs under one scale; -1 for the whole row. The last group of a row may be short.
    """
    if torch.is_grad_enabled():
        fake_OI: Tensor = _FakeQuantize.apply(w_OI, scale_OG, zero_OG, bits, group_size)  # type: ignore[no-untyped-call]
        return fake_OI
    _, code_OGS = _codes(w_OI, scale_OG, zero_OG, bits, group_size)
    return decode_steps(code_OGS, scale_OG, zero_OG, w_OI.shape[-1])


def grouped(w_OI: Tensor, group_size: int) -> Tensor:
    """The columns of each group in a dimension of their own, [.., O, G, S]; a short last group is filled up with 0."""
    width = w_OI.shape[-1]
    size = width if group_size < 0 else group_size
    short = -width % size
    return (torch.nn.functional.pad(w_OI, (0, short)) if short else w_OI).unflatten(-1, (-1, size))


def ungrouped(w_OGS: Tensor, in_features: int) -> Tensor:
    """The inverse of `grouped`."""
    return w_OGS.flatten(-2)[..., :in_features]


def gradient_factor(group_size: int, in_features: int, bits: int) -> float:
    """LSQ's factor on the gradient of a step, `1 / sqrt(n Qp)`."""
    return 1 / math.sqrt((in_features if group_size < 0 else group_size) * (2 ** (bits - 1) - 1))


def _codes(w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """How many steps each weight is away, [.., O, G, S], and the same as its code has it: rounded and clipped.

    Counted from the code of zero; where zero points are real, from the value of code 0.
    """
    steps_OGS, most = grouped(w_OI, group_size), 2**bits - 1
    if zero_OG is None or zero_OG.is_floating_point():
        least = -(2 ** (bits - 1)) if zero_OG is None else 0
        if zero_OG is not None:
            steps_OGS = steps_OGS - zero_OG[..., None]
        steps_OGS = steps_OGS / scale_OG[..., None]
        return steps_OGS, steps_OGS.round().clamp_(least, least + most)
    steps_OGS, least_OG1 = steps_OGS / scale_OG[..., None], -zero_OG[..., None].float()
    # On CPUs several times as fast as `clamp` with tensors.
    return steps_OGS, torch.minimum(torch.maximum(steps_OGS.round(), least_OG1), least_OG1 + most)


def decode_steps(code_OGS: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, in_features: int) -> Tensor:
    """What codes stand for, [.., O, I]: counted in steps from the code of zero, or from 0 where zero points are real.

    The gradient flows to scales and real zero points.
    """
    value_OGS = code_OGS * scale_OG[..., None]
    if zero_OG is not None and zero_OG.is_floating_point():
        value_OGS = value_OGS + zero_OG[..., None]
    return ungrouped(value_OGS, in_features)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, group_size: int) -> Tensor:
        steps_OGS, code_OGS = _codes(w_OI, scale_OG, zero_OG, bits, group_size)
        inside_OGS = (steps_OGS.round() == code_OGS).to(w_OI.dtype)
        slope_OGS = code_OGS - steps_OGS * inside_OGS if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside_OGS, slope_OGS)
        ctx.group_size, ctx.factor = group_size, gradient_factor(group_size, w_OI.shape[-1], bits)
        return decode_steps(code_OGS, scale_OG, zero_OG, w_OI.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        inside_OGS, slope_OGS = ctx.saved_tensors
        grad_OGS = grouped(grad_OI, ctx.group_size)
        needs_w, needs_scale, needs_zero, *_ = ctx.needs_input_grad
        grad_w = ungrouped(grad_OGS * inside_OGS, grad_OI.shape[-1]) if needs_w else None
        grad_scale = (grad_OGS * slope_OGS).sum(dim=-1).mul_(ctx.factor) if needs_scale else None
        grad_zero = (grad_OGS * (1 - inside_OGS)).sum(dim=-1).mul_(ctx.factor) if needs_zero else None
        return grad_w, grad_scale, grad_zero, None, None

"""DoRA on a frozen weight of any storage format: LoRA's operator, and its outputs at learnt lengths, recorded as one.

`y = m / n (x W^T + s (k o x) A^T B^T) + bias`, n a constant: Liu et al. 2024 (arXiv:2402.09353) equation 5 and section
4.3. The parts are lora.py's and lengths.py's; a node of autograd for each of them would cost as much as the lengths do.

Shape suffixes: B leading dimensions, O out features, I in features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.kernels import lora
from finetune.kernels.lengths import at_lengths, scale_outputs_, scale_outputs_backward
from finetune.kernels.operand import Operand

LENGTHS = 4
"""Tensors that the lengths' backward reads: what was scaled, m, n and the bias."""


def dora_linear(
    x_BI: Tensor,
    bias_O: Tensor | None,
    base: Operand,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
    magnitude_O: Tensor,
    norm_O: Tensor,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """`y_BO` in the dtype of `x_BI`. Where m is n and B = 0 it is the base's own product, bit for bit.

    The gradient flows to x, A, B and m, once, and to a bias as if it were none of the sum: no one trains it here.

    Args:
        magnitude_O, norm_O: m and n, of one float dtype.
        base, a_RI, b_OR, scaling, dropout: as for `lora_linear`.
    """
    if torch.compiler.is_compiling():
        y_BO = lora.lora_linear(x_BI, bias_O, base, a_RI, b_OR, scaling, dropout=dropout)
        return at_lengths(y_BO, magnitude_O, norm_O, bias_O)
    inputs = lora.arguments(x_BI, bias_O, base, a_RI, b_OR, scaling, dropout)
    if torch.is_grad_enabled():
        found: Tensor = _Recorded.apply(magnitude_O, norm_O, *inputs)  # type: ignore[no-untyped-call]
        return found
    y_BO, _ = torch.ops.finetune.lora_linear(*inputs)
    scale_outputs_(y_BO, magnitude_O, norm_O, bias_O)
    return y_BO


class _Recorded(torch.autograd.Function):
    """The operator as eager autograd records it."""

    @staticmethod
    def forward(ctx: Any, magnitude_O: Tensor, norm_O: Tensor, *inputs: Any) -> Tensor:
        output = torch.ops.finetune.lora_linear(*inputs)
        scaled_BO, bias_O = output[0], inputs[1]
        scale_outputs_(scaled_BO, magnitude_O, norm_O, bias_O)
        lora.save(ctx, inputs, output, scaled_BO, magnitude_O, norm_O, bias_O)
        return scaled_BO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # one read: each unpacks all of them
        grad_BO, grad_magnitude_O = scale_outputs_backward(grad_BO, *saved[:LENGTHS])
        need_x, _, *needs = ctx.needs_input_grad[2:]
        grad_x, _, _, *rest = lora.backward(ctx, grad_BO, saved[LENGTHS:], (need_x, False, *needs))
        return grad_magnitude_O, None, grad_x, None, None, *rest

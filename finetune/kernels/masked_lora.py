"""LoRA on a pruned weight: a low-rank product whose zeros are those of the weight it belongs to.

`y = x (M o (W + s B A))^T + b`, M being 0 where the weight has to be zero. Unlike the plain product this one cannot be
multiplied a rank at a time: M o B A is formed in every pass. Its gradient wants `g^T x`, a product as large as the
layer's own; with W in the sum that is three such products for a forward and a backward pass, for two of the plain one.

Shape suffixes: B leading dimensions, N rows (B flattened), O out features, I in features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.kernels.autocast import no_autocast
from finetune.kernels.products import autocast

Dense = Callable[[], Tensor]
"""Gives a frozen [O, I], decoded or not."""


def masked_lora_linear(
    x_BI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float,
    cleared: Dense,
    base: Dense | None = None,
    bias_O: Tensor | None = None,
) -> Tensor:
    """`x_BI @ (M o (W + scaling * B A)).T + bias` in the dtype of `x_BI`.

    The gradient flows to x, A, B and the bias, once; there is no second derivative. Under autocast `x_BI` is cast.

    Args:
        a_RI, b_OR: the factors, in any float dtype; cast to that of `x_BI`, and their gradients come in their own.
        scaling: s.
        cleared: bool, where M is 0; W is 0 there too.
        base: W, in the dtype of `x_BI`; None for nothing.
    """
    x_BI, bias_O = autocast(x_BI, bias_O)
    with no_autocast(x_BI):
        w_OI, kept_OI = None if base is None else base(), cleared().logical_not()
        if x_BI.element_size() == 2:
            kept_OI = kept_OI.to(x_BI.dtype)  # four times as fast to multiply by, and a byte more
        return _Masked.apply(x_BI, bias_O, a_RI.to(x_BI.dtype), b_OR.to(x_BI.dtype), scaling, kept_OI, w_OI)


def _weights(a_RI: Tensor, b_OR: Tensor, kept_OI: Tensor, w_OI: Tensor | None) -> list[Tensor]:
    """W + M o B A in as many terms as it takes: in 16 bits the sum would round most of the product away.

    In memory the sum lies as W does, so that a product has the bits that it has with W alone.
    """
    if w_OI is None or w_OI.is_contiguous():
        change_OI = b_OR @ a_RI
    else:
        change_OI = (a_RI.t() @ b_OR.t()).t()
    change_OI.mul_(kept_OI)  # masked_fill_ takes ten times as long on CPUs
    if w_OI is None:
        return [change_OI]
    return [w_OI, change_OI] if w_OI.element_size() == 2 else [change_OI.add_(w_OI)]


def _rows(x_BX: Tensor) -> Tensor:
    return x_BX.reshape(-1, x_BX.shape[-1])


class _Masked(torch.autograd.Function):
    """Keeps the terms and the mask for the backward: to form them again costs more than they take, in 16 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        kept: Tensor,
        w: Tensor | None,
    ) -> Tensor:
        first, *more = _weights(a, b * scaling, kept, w)
        ctx.save_for_backward(x, a, b, kept, first, *more)
        ctx.scaling = scaling
        y_BO = torch.nn.functional.linear(x, first, bias).contiguous()
        for weight_OI in more:
            _rows(y_BO).addmm_(_rows(x), weight_OI.t())
        # What is made of flattened rows may be a view, which nobody may write to: models add to outputs in place.
        return y_BO.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Any, ...]:
        x_BI, a_RI, b_OR, kept_OI, first, *more = ctx.saved_tensors
        need_x, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        with no_autocast(grad_BO):
            if need_a or need_b:
                of_sum_OI = (_rows(grad_BO).t() @ _rows(x_BI)).mul_(kept_OI)
                grad_a = (b_OR.t() @ of_sum_OI).mul_(ctx.scaling)
                grad_b = (of_sum_OI @ a_RI.t()).mul_(ctx.scaling)
            if need_x:
                grad_x = (grad_BO @ first).contiguous()
                for weight_OI in more:
                    _rows(grad_x).addmm_(_rows(grad_BO), weight_OI)
            grad_bias = _rows(grad_BO).sum(dim=0) if need_bias else None
        return grad_x, grad_bias, grad_a, grad_b, None, None, None

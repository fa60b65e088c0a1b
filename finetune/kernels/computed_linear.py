"""A linear layer whose weight is computed from what trains, and computed again in the backward pass.

Autograd would keep the computed weight of every layer, and what was needed to compute it, until the backward: a dense
model in float32 beside the stored one. Here only the input and the trained tensors are kept.

Shape suffixes: B leading dimensions, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetune.kernels.autocast import no_autocast
from finetune.kernels.products import autocast

Weight = Callable[..., Tensor]
"""Makes w_OI, float32, of the trained tensors; the same bits each time it is called with the same ones."""


def computed_linear(x_BI: Tensor, bias_O: Tensor | None, weight: Weight, *trained: Tensor) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` in the dtype of `x_BI`, with `w_OI = weight(*trained)` rounded to it.

    The gradient flows to `x_BI` and to the trained tensors, once: there is no second derivative. Same bits whatever the
    grad mode. Under autocast `x_BI` is cast first.
    """
    x_BI, bias_O = autocast(x_BI, bias_O)
    if torch.is_grad_enabled():
        y_BO: Tensor = _Computed.apply(x_BI, bias_O, weight, *trained)  # type: ignore[no-untyped-call]
        return y_BO
    return _product(x_BI, bias_O, weight, trained)


def _product(x_BI: Tensor, bias_O: Tensor | None, weight: Weight, trained: tuple[Tensor, ...]) -> Tensor:
    with no_autocast(x_BI):
        return functional.linear(x_BI, weight(*trained).to(x_BI.dtype), bias_O)


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, bias_O: Tensor | None, weight: Weight, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x_BI, *trained)
        ctx.weight = weight
        return _product(x_BI, bias_O, weight, trained)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, *trained = ctx.saved_tensors
        needs_x, _, _, *needs = ctx.needs_input_grad
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(trained, needs, strict=True)]
        with torch.enable_grad(), no_autocast(grad_BO):
            w_OI = ctx.weight(*leaves)
        grad_x = grad_BO @ w_OI.detach().to(grad_BO.dtype) if needs_x else None
        found: list[Tensor | None] = [None] * len(leaves)
        if any(needs):
            grad_OI = grad_BO.reshape(-1, grad_BO.shape[-1]).t() @ x_BI.reshape(-1, x_BI.shape[-1])
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            given = iter(torch.autograd.grad(w_OI, wanted, grad_OI.to(w_OI.dtype)))
            found = [next(given) if need else None for need in needs]
        return (grad_x, None, None, *found)

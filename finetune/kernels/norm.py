"""RMSNorm as one operator: schema, fake implementation, autograd, reference.

Zhang and Sennrich 2019 (arXiv:1910.07467). `y = x r (w + offset)` with `r = 1 / sqrt(mean(x^2) + eps)`, computed in
float32 and rounded once; an offset of 1 is Gemma's form. Saved for the backward are x and r.

Shape suffixes: M rows (all leading dimensions), N features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("finetune", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)")
_library.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, float offset, bool weight_grad)"
    " -> (Tensor, Tensor)"
)


def rms_norm(x_MN: Tensor, weight_N: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`x r (w + offset)` over the last dimension, in the dtype of `x_MN`.

    Args:
        x_MN: any leading dimensions, any float dtype.
        weight_N: any float dtype; gets a gradient only where it requires one.
        eps: added to the mean square.
        offset: added to the weight.
    """
    y_MN: Tensor = torch.ops.finetune.rms_norm(x_MN, weight_N, eps, offset)[0]
    return y_MN


def reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The operator in plain torch."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * inverse.unsqueeze(-1) * (weight.float() + offset)).to(x.dtype).contiguous(), inverse


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (an empty tensor where not wanted) in plain torch."""
    wide, r = x.float(), inverse.unsqueeze(-1)
    through = grad.float() * (weight.float() + offset)
    grad_x = r * (through - wide * (through * wide).mean(-1, keepdim=True) * r.square())
    rows = (grad.float() * wide * r).reshape(-1, x.shape[-1])
    grad_weight = rows.sum(0).to(weight.dtype) if weight_grad else weight.new_empty(0)
    return grad_x.to(x.dtype).contiguous(), grad_weight


def _fake(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_grad else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.offset = offset
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.finetune.rms_norm_backward(grad, *ctx.saved_tensors, ctx.offset, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None, None, None


torch.library.impl("finetune::rms_norm", "default")(reference)
torch.library.impl("finetune::rms_norm_backward", "default")(reference_backward)
torch.library.register_fake("finetune::rms_norm")(_fake)
torch.library.register_fake("finetune::rms_norm_backward")(_backward_fake)
torch.library.register_autograd("finetune::rms_norm", _backward, setup_context=_save)

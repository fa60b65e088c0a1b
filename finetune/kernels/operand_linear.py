"""`finetune::operand_linear`: the product with any frozen weight as one operator that autograd records.

Shape suffixes: B leading dimensions, O out features, I in features.

The backward decodes again: of the weight only what is stored is saved. Every storage format takes part by what it told
`operand.register_format`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.kernels import operand
from finetune.kernels.operand import Operand
from finetune.kernels.products import autocast, library


def operand_linear(x_BI: Tensor, bias_O: Tensor | None, weight: Operand) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` in the dtype of `x_BI`; the gradient flows to `x_BI` and `bias_O`.

    Same bits whatever the grad mode. Under autocast `x_BI` is cast first.
    """
    x_BI, bias_O = autocast(x_BI, bias_O)
    return torch.ops.finetune.operand_linear(x_BI, bias_O, weight.tensors, weight.spec, weight.out_features)


library.define("operand_linear(Tensor x, Tensor? bias, Tensor[] weight, str spec, SymInt out_features) -> Tensor")
library.define("operand_input_gradient(Tensor grad, Tensor[] weight, str spec, SymInt in_features) -> Tensor")


@torch.library.impl("finetune::operand_linear", "default")
def _linear(x: Tensor, bias: Tensor | None, weight: list[Tensor], spec: str, out_features: int) -> Tensor:
    return operand.linear(x, bias, weight, spec, out_features)


@torch.library.impl("finetune::operand_input_gradient", "default")
def _input_gradient(grad: Tensor, weight: list[Tensor], spec: str, in_features: int) -> Tensor:
    return operand.input_gradient(grad, weight, spec, in_features)


@torch.library.register_fake("finetune::operand_linear")
def _linear_fake(x: Tensor, bias: Tensor | None, weight: list[Tensor], spec: str, out_features: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], out_features])


@torch.library.register_fake("finetune::operand_input_gradient")
def _input_gradient_fake(grad: Tensor, weight: list[Tensor], spec: str, in_features: int) -> Tensor:
    return grad.new_empty([*grad.shape[:-1], in_features])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, weight, spec, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.spec, ctx.in_features = spec, x.shape[-1]


def _backward(ctx: Any, grad_BO: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    stored = list(ctx.saved_tensors)  # to be asked for once only: checkpointing computes it anew
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.finetune.operand_input_gradient(grad_BO, stored, ctx.spec, ctx.in_features)
    if ctx.needs_input_grad[1]:
        grad_bias = grad_BO.reshape(-1, grad_BO.shape[-1]).sum(dim=0)
    return grad_x, grad_bias, [None] * len(stored), None, None


torch.library.register_autograd("finetune::operand_linear", _backward, setup_context=_save)

"""Operators of one storage format, made from its decoder: the product with a frozen weight and with its transpose.

Shape suffixes: B any leading dimensions, O out features, I in features.

A format defines `finetune::dequantize_<format>(<tensors>, <settings>, SymInt[] shape, ScalarType dtype)` itself;
`define_products` adds to it

- `finetune::linear_<format>(x, bias?, <tensors>, <settings>, out_features)`: x_BI @ w_OI.T + bias_O
- `finetune::input_gradient_<format>(grad, <tensors>, <settings>, in_features)`: grad_BO @ w_OI

with fake implementations and autograd. The backward decodes again: nothing but the stored tensors is saved. The
reference serves every device; a backend that registers a kernel for a device goes before it, with
`torch.library.impl("finetune::linear_<format>", "cpu")(function)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("finetune", "FRAGMENT")


def define_products(name: str, storage: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Define the two products of a format whose `dequantize_<name>` exists; gives back their references.

    Args:
        name: of the format.
        storage: schema of its arguments: first the stored tensors, then the settings.
    """
    tensors = storage.count("Tensor")
    width = len(storage.split(","))
    library.define(f"linear_{name}(Tensor x, Tensor? bias, {storage}, SymInt out_features) -> Tensor")
    library.define(f"input_gradient_{name}(Tensor grad, {storage}, SymInt in_features) -> Tensor")
    linear, input_gradient = f"finetune::linear_{name}", f"finetune::input_gradient_{name}"
    references = reference_linear(name), reference_input_gradient(name)
    torch.library.impl(linear, "default")(references[0])
    torch.library.impl(input_gradient, "default")(references[1])
    torch.library.register_fake(linear)(_linear_fake)
    torch.library.register_fake(input_gradient)(_input_gradient_fake)

    def save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, *stored, _ = inputs
        ctx.save_for_backward(*stored[:tensors])
        ctx.settings, ctx.in_features = stored[tensors:], x.shape[-1]

    def linear_backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _op(f"input_gradient_{name}")(grad_BO, *ctx.saved_tensors, *ctx.settings, ctx.in_features)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_BO.reshape(-1, grad_BO.shape[-1]).sum(dim=0)
        return (grad_x, grad_bias, *[None] * (width + 1))

    def save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, *stored, _ = inputs
        ctx.save_for_backward(*stored[:tensors])
        ctx.settings, ctx.out_features = stored[tensors:], grad.shape[-1]

    def gradient_backward(ctx: Any, second_BI: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient is linear in `grad_BO`: its derivative is the forward again."""
        grad = _op(f"linear_{name}")(second_BI, None, *ctx.saved_tensors, *ctx.settings, ctx.out_features)
        return (grad, *[None] * (width + 1))

    torch.library.register_autograd(linear, linear_backward, setup_context=save_linear)
    torch.library.register_autograd(input_gradient, gradient_backward, setup_context=save_gradient)
    return references


def reference_linear(name: str) -> Callable[..., Tensor]:
    """`linear_<name>` as decode, then torch's product: what any backend falls back to."""

    def linear(x: Tensor, bias: Tensor | None, *storage_and_width: Any) -> Tensor:
        *storage, out_features = storage_and_width
        weight_OI = _op(f"dequantize_{name}")(*storage, [out_features, x.shape[-1]], x.dtype)
        # Autocast would otherwise act a second time, on the tensors inside, and contradict the fake implementation.
        with torch.autocast(x.device.type, enabled=False):
            return owned(torch.nn.functional.linear(x, weight_OI, bias))

    return linear


def reference_input_gradient(name: str) -> Callable[..., Tensor]:
    """`input_gradient_<name>` as decode, then torch's product."""

    def input_gradient(grad: Tensor, *storage_and_width: Any) -> Tensor:
        *storage, in_features = storage_and_width
        weight_OI = _op(f"dequantize_{name}")(*storage, [grad.shape[-1], in_features], grad.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ weight_OI

    return input_gradient


def owned(y: Tensor) -> Tensor:
    """What an operator gives back, as no view: models add to outputs in place (`y += residual`, as Falcon does), which
    autograd refuses on views that were made inside of an operator. Nothing is copied."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def autocast(x_BI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The input as autocast would hand it to `torch.nn.functional.linear`, and the bias in the same dtype."""
    kind = x_BI.device.type
    if torch.is_autocast_enabled(kind):
        x_BI = x_BI.to(torch.get_autocast_dtype(kind))
    return x_BI, None if bias_O is None else bias_O.to(x_BI.dtype)


def _op(name: str) -> Callable[..., Tensor]:
    return getattr(torch.ops.finetune, name)


def _linear_fake(x: Tensor, bias: Tensor | None, *storage_and_width: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], storage_and_width[-1]])


def _input_gradient_fake(grad: Tensor, *storage_and_width: Any) -> Tensor:
    return grad.new_empty([*grad.shape[:-1], storage_and_width[-1]])

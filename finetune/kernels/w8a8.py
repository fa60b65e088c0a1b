"""Weights and inputs both rounded to integers: the reference in plain torch and the operators of w8a8, w6a6 and w4a8.

Shape suffixes: M rows of the input, B its leading dimensions, O out features, I in features, G groups of a row.

Symmetric integers (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, section 2): `code = round(v / scale)`, half to
even, from -L to L with L = 2^(bits-1) - 1, and `scale = max|v| / L`. A weight has one scale a row, one for each of G
runs of as many columns of a row (ZeroQuant, Yao et al. 2022, arXiv:2206.01861, section 4.1), or one for all of it; an
input one a row (token), one for the whole call (tensor), or one fixed beforehand (static), beyond which it is clipped:
to -L - 1 below, where vLLM and compressed-tensors saturate. The product of codes is exact in int32 and scaled once,
`y = product * (scale_x * scale_w) + bias`; with groups there is one product for each, scaled before they are added up
in float32.

- `finetune::dequantize_w8a8`, `linear_w8a8`, `input_gradient_w8a8` (products.py): the input is left alone.
- `finetune::integer_linear_w8a8`: the input is rounded as well. Its gradient is straight-through: grad @ w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.kernels import (
    cpu_integer,
    cpu_stored,
    int8,  # noqa: F401 - defines finetune::int8_product
)
from finetune.kernels.operand import register_format
from finetune.kernels.products import autocast, define_products, library, owned

_STORAGE = "Tensor codes, Tensor scale"


def levels(bits: int) -> int:
    """The largest code of so many bits."""
    return 2 ** (bits - 1) - 1


def round_to(value: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    """The codes nearest to a value on a scale that broadcasts with it, int8; 0 where value and scale are 0."""
    divisor = torch.where(scale > 0, scale, 1.0)
    return (value.float() / divisor).round_().clamp_(least, most).to(torch.int8)


def input_scale(x_MI: Tensor, bits: int, per_token: bool, static: Tensor | None) -> Tensor:
    """The scale of an input, float32 [M, 1] (per token, or static) or [1, 1].

    A row that is not finite gets a scale that is not either, so that the product shows it.

    Args:
        static: float32 [1], the scale that was found in calibration.
    """
    if static is not None:
        finite_M1 = x_MI.isfinite().all(dim=1, keepdim=True)
        return torch.where(finite_M1, static, torch.nan)
    largest_M1 = x_MI.abs().amax(dim=1, keepdim=True).float()
    largest = largest_M1 if per_token else largest_M1.amax(dim=0, keepdim=True)
    return largest / levels(bits)


def decode(codes_OI: Tensor, scale: Tensor) -> Tensor:
    """`code * scale` in float32; the scale broadcasts, or is [.., O, G]."""
    if scale.shape[-1] == 1:
        return codes_OI.float() * scale
    return (codes_OI.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


def scaled_product(codes_MI: Tensor, codes_OI: Tensor, scale_x: Tensor, scale: Tensor) -> Tensor:
    """`(codes_MI * scale_x) @ (codes_OI * scale).T` in float32, by exact products of integers.

    Args:
        scale_x: float32, broadcasts with [M, 1].
        scale: float32 [O, G] or [1].
    """
    groups = scale.shape[-1]
    if groups == 1:
        return torch.ops.finetune.int8_product(codes_MI, codes_OI).float().mul_(scale_x * scale.view(1, -1))
    y_MO = scale_x.new_zeros(codes_MI.shape[0], codes_OI.shape[0])
    for x_MC, w_OC, scale_O in zip(codes_MI.chunk(groups, 1), codes_OI.chunk(groups, 1), scale.unbind(1), strict=True):
        y_MO += torch.ops.finetune.int8_product(x_MC.contiguous(), w_OC.contiguous()).float().mul_(scale_O)
    return y_MO.mul_(scale_x)


def dequantize_w8a8(codes_OI: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Decode to a dense weight of `shape` in float32, then cast to `dtype`. No gradient flows.

    Args:
        codes_OI: int8 [.., O, I].
        scale: float32 [.., O, G] or [.., 1, 1] or [1].
    """
    return torch.ops.finetune.dequantize_w8a8(codes_OI, scale, shape, dtype)


def linear_w8a8(x_BI: Tensor, bias_O: Tensor | None, codes_OI: Tensor, scale: Tensor) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` in the dtype of `x_BI`, which is left as it is; as `integer_linear` otherwise."""
    x_BI, bias_O = autocast(x_BI, bias_O)
    return torch.ops.finetune.linear_w8a8(x_BI, bias_O, codes_OI, scale, codes_OI.shape[0])


def integer_linear(
    x_BI: Tensor,
    bias_O: Tensor | None,
    codes_OI: Tensor,
    scale: Tensor,
    static: Tensor | None,
    bits: int,
    per_token: bool,
) -> Tensor:
    """`round(x_BI) @ w_OI.T + bias_O` in the dtype of `x_BI`.

    The gradient flows to `x_BI` (`grad_BO @ w_OI`, also where a static scale clipped), and to `bias_O` where it asks
    for one. Under autocast `x_BI` is cast first.

    Args:
        scale: of the weight, float32 [O, G] or [1].
        static: the scale of the input, float32 [1]; None takes that of each call.
        bits: of a code of the input, at most 8.
        per_token: without `static`, each row of the input has its own scale.
    """
    x_BI, bias_O = autocast(x_BI, bias_O)
    return torch.ops.finetune.integer_linear_w8a8(x_BI, bias_O, codes_OI, scale, static, bits, per_token)


library.define(f"dequantize_w8a8({_STORAGE}, SymInt[] shape, ScalarType dtype) -> Tensor")
library.define(
    f"integer_linear_w8a8(Tensor x, Tensor? bias, {_STORAGE}, Tensor? static, int bits, bool per_token) -> Tensor"
)


def reference_dequantize(codes: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The operator in plain torch."""
    return decode(codes, scale).to(dtype).view(shape)


torch.library.impl("finetune::dequantize_w8a8", "default")(reference_dequantize)


@torch.library.register_fake("finetune::dequantize_w8a8")
def _dequantize_fake(codes: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


_products = define_products("w8a8", _STORAGE)


@torch.library.impl("finetune::integer_linear_w8a8", "default")
def _integer_linear(
    x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, static: Tensor | None, bits: int, per_token: bool
) -> Tensor:
    x_MI = x.reshape(-1, x.shape[-1])
    if not x_MI.numel():
        return x.new_zeros([*x.shape[:-1], codes.shape[0]]) + (0 if bias is None else bias)
    scale_x, most = input_scale(x_MI, bits, per_token, static), levels(bits)
    codes_MI = round_to(x_MI, scale_x, -most if static is None else -most - 1, most)
    y_MO = scaled_product(codes_MI, codes, scale_x, scale)
    if bias is not None:
        y_MO += bias
    return owned(y_MO.to(x.dtype).view(*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("finetune::integer_linear_w8a8")
def _integer_linear_fake(
    x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, static: Tensor | None, bits: int, per_token: bool
) -> Tensor:
    return x.new_empty([*x.shape[:-1], codes.shape[0]])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, codes, scale, *_ = inputs
    ctx.save_for_backward(codes, scale)


def _backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through: as if the input had not been rounded."""
    codes, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.finetune.input_gradient_w8a8(grad_BO, codes, scale, codes.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_bias = grad_BO.reshape(-1, grad_BO.shape[-1]).sum(dim=0)
    return grad_x, grad_bias, None, None, None, None, None


torch.library.register_autograd("finetune::integer_linear_w8a8", _backward, setup_context=_save)


def _operand_linear(
    x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], settings: list[str], out_features: int
) -> Tensor:
    """As `operand.Product`; tensors are codes, scale and where it is static the input's scale; the settings are the
    bits of inputs and how they are rounded: token, tensor, static or none."""
    codes, scale, *static = tensors
    bits, inputs = settings
    if inputs == "none":
        return torch.ops.finetune.linear_w8a8(x_BI, bias_O, codes, scale, out_features)
    fixed = static[0] if static else None
    return torch.ops.finetune.integer_linear_w8a8(x_BI, bias_O, codes, scale, fixed, int(bits), inputs == "token")


def _operand_gradient(grad_BO: Tensor, tensors: list[Tensor], settings: list[str], in_features: int) -> Tensor:
    """As `operand.Gradient`."""
    return torch.ops.finetune.input_gradient_w8a8(grad_BO, *tensors[:2], in_features)


register_format("w8a8", _operand_linear, _operand_gradient)
cpu_stored.serve("w8a8", cpu_integer.w8a8, (reference_dequantize, *_products))

"""The 4-bit operators as torch sees them: schema, fake implementation, autograd. Backends register beside.

Shape suffixes: B any leading dimensions, O out features, I in features, N = O * I, G blocks, P packed bytes.

`finetune::quantize_4bit` encodes and `finetune::dequantize_4bit` decodes; `finetune::linear_4bit` multiplies by a
decoded weight and `finetune::input_gradient_4bit` by its transpose. The reference below serves every device. A backend
is one file that calls `torch.library.impl("finetune::dequantize_4bit", "cuda")(function)`, and likewise for the
products where it can fuse: a kernel registered for a device goes before the reference. A backend that decodes only is
used by the products as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.kernels import cpu_codebook4, reference, triton_backend
from finetune.kernels.operand import register_format
from finetune.kernels.products import owned

_STORAGE = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str codebook, int block_size"

_library = torch.library.Library("finetune", "FRAGMENT")
_library.define(f"dequantize_4bit({_STORAGE}, SymInt[] shape, ScalarType dtype) -> Tensor")
_library.define(f"linear_4bit(Tensor x, Tensor? bias, {_STORAGE}, SymInt out_features) -> Tensor")
_library.define(f"input_gradient_4bit(Tensor grad, {_STORAGE}, SymInt in_features) -> Tensor")
_library.define("quantize_4bit(Tensor weight, str codebook, int block_size) -> (Tensor, Tensor)")


def quantize_4bit(weight: Tensor, codebook: str, block_size: int, double_quant: bool) -> reference.Packed4bit:
    """Encode a weight of any shape and float dtype: `reference.quantize_4bit`, bit for bit, by the device's backend."""
    codes_P1, absmax_G = torch.ops.finetune.quantize_4bit(weight.detach(), codebook, block_size)
    if not double_quant:
        return reference.Packed4bit(codes_P1, absmax_G)
    return reference.Packed4bit(codes_P1, *reference.nest_absmax(absmax_G))


def dequantize_4bit(
    packed_P1: Tensor,
    absmax_G: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode 4-bit codes to a dense weight of `shape`: `table[code] * absmax` in float32, then cast to `dtype`.

    Args:
        packed_P1: uint8 [P, 1], P = ceil(prod(shape) / 2), the first of two codes in the high nibble.
        absmax_G: float32 [G], or uint8 [G] under double quantization, blocks over the flattened weight.
        nested_absmax: float32 [ceil(G / 256)] under double quantization, else None.
        offset: float32 [1] under double quantization, else None.
        codebook: "nf4" or "fp4".
        block_size: weights under one absmax.

    No gradient flows: a frozen base has none.
    """
    return torch.ops.finetune.dequantize_4bit(
        packed_P1, absmax_G, nested_absmax, offset, codebook, block_size, shape, dtype
    )


def linear_4bit(
    x_BI: Tensor,
    bias_O: Tensor | None,
    packed_P1: Tensor,
    absmax_G: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: str,
    block_size: int,
    out_features: int,
) -> Tensor:
    """`y_BO = x_BI @ w_OI.T + bias_O` in the dtype of `x_BI`, `w_OI` as `dequantize_4bit` gives it.

    The backward decodes the weight again and keeps no dense copy in between: only the packed tensors are saved. The
    gradient flows to `x_BI`, and to `bias_O` where it asks for one. Same bits whatever the grad mode. Under autocast
    `x_BI` is cast first, as for `torch.nn.functional.linear`.
    """
    kind = x_BI.device.type
    if torch.is_autocast_enabled(kind):
        x_BI = x_BI.to(torch.get_autocast_dtype(kind))
    if bias_O is not None:
        bias_O = bias_O.to(x_BI.dtype)
    return torch.ops.finetune.linear_4bit(
        x_BI, bias_O, packed_P1, absmax_G, nested_absmax, offset, codebook, block_size, out_features
    )


@torch.library.impl("finetune::quantize_4bit", "default")
def _quantize(weight: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    packed = reference.quantize_4bit(weight, codebook, block_size, False)
    return packed.codes_P1, packed.absmax_G


@torch.library.impl("finetune::dequantize_4bit", "default")
def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    codebook: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    storage = reference.Packed4bit(packed, absmax, nested_absmax, offset)
    return reference.dequantize_4bit(storage, codebook, block_size, shape, dtype)


@torch.library.impl("finetune::linear_4bit", "default")
def _linear(x: Tensor, bias: Tensor | None, *storage_and_width: Any) -> Tensor:
    *storage, out_features = storage_and_width
    weight_OI = torch.ops.finetune.dequantize_4bit(*storage, [out_features, x.shape[-1]], x.dtype)
    # Autocast would otherwise act a second time, on the tensors inside, and contradict the fake implementation.
    with torch.autocast(x.device.type, enabled=False):
        return owned(torch.nn.functional.linear(x, weight_OI, bias))


@torch.library.impl("finetune::input_gradient_4bit", "default")
def _input_gradient(grad: Tensor, *storage_and_width: Any) -> Tensor:
    *storage, in_features = storage_and_width
    weight_OI = torch.ops.finetune.dequantize_4bit(*storage, [grad.shape[-1], in_features], grad.dtype)
    with torch.autocast(grad.device.type, enabled=False):
        return grad @ weight_OI


@torch.library.register_fake("finetune::quantize_4bit")
def _quantize_fake(weight: Tensor, codebook: str, block_size: int) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    codes_P1 = weight.new_empty([(count + 1) // 2, 1], dtype=torch.uint8)
    return codes_P1, weight.new_empty([-(-count // block_size)], dtype=torch.float32)


@torch.library.register_fake("finetune::dequantize_4bit")
def _dequantize_fake(packed: Tensor, *rest: Any) -> Tensor:
    *_, shape, dtype = rest
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("finetune::linear_4bit")
def _linear_fake(x: Tensor, bias: Tensor | None, *storage_and_width: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], storage_and_width[-1]])


@torch.library.register_fake("finetune::input_gradient_4bit")
def _input_gradient_fake(grad: Tensor, *storage_and_width: Any) -> Tensor:
    return grad.new_empty([*grad.shape[:-1], storage_and_width[-1]])


def _save_for_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, packed, absmax, nested_absmax, offset, codebook, block_size, _ = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, offset)
    ctx.format = (codebook, block_size)
    ctx.in_features = x.shape[-1]


def _linear_backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.finetune.input_gradient_4bit(grad_BO, *ctx.saved_tensors, *ctx.format, ctx.in_features)
    if ctx.needs_input_grad[1]:
        grad_bias = grad_BO.reshape(-1, grad_BO.shape[-1]).sum(dim=0)
    return (grad_x, grad_bias, *[None] * 7)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, packed, absmax, nested_absmax, offset, codebook, block_size, _ = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, offset)
    ctx.format = (codebook, block_size)
    ctx.out_features = grad.shape[-1]


def _gradient_backward(ctx: Any, second_BI: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient is linear in `grad_BO`, with the transposed weight: its derivative is the forward again."""
    grad = torch.ops.finetune.linear_4bit(second_BI, None, *ctx.saved_tensors, *ctx.format, ctx.out_features)
    return (grad, *[None] * 7)


torch.library.register_autograd("finetune::linear_4bit", _linear_backward, setup_context=_save_for_linear)
torch.library.register_autograd("finetune::input_gradient_4bit", _gradient_backward, setup_context=_save_for_gradient)


def _operand_linear(
    x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], settings: list[str], out_features: int
) -> Tensor:
    """As `operand.Product`; tensors are packed, absmax and, under double quantization, nested absmax and offset."""
    storage = [*tensors, None, None][:4]
    return torch.ops.finetune.linear_4bit(x_BI, bias_O, *storage, settings[0], int(settings[1]), out_features)


def _operand_gradient(grad_BO: Tensor, tensors: list[Tensor], settings: list[str], in_features: int) -> Tensor:
    """As `operand.Gradient`."""
    storage = [*tensors, None, None][:4]
    return torch.ops.finetune.input_gradient_4bit(grad_BO, *storage, settings[0], int(settings[1]), in_features)


register_format("codebook4", _operand_linear, _operand_gradient)
for _operator in ("quantize", "dequantize", "linear", "input_gradient"):
    triton_backend.register(f"{_operator}_4bit", "triton_codebook4", _operator)
cpu_codebook4.register()

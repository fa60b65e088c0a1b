"""Row-wise int8 weights: the reference in plain torch and the operators, weight-only and LLM.int8().

Shape suffixes: M rows of the input, B its leading dimensions, O out features, I in features.

LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), section 3. A weight is stored once: absmax_O = max|w| of a row,
code = round(w * 127 / absmax), decoded `code * (absmax / 127)`. Codes, absmax, the codes of the input and the int32
product are those of bitsandbytes 0.50.2, bit for bit; the product's scale is 1/127^2 (bitsandbytes has 6.200124e-05, a
typo that is 1.8e-5 too large).

- `finetune::dequantize_int8`, `linear_int8`, `input_gradient_int8` (products.py): the input stays in 16 bits.
- `finetune::int8_product`: codes by codes, exact in int32.
- `finetune::llm_int8`: the input is rounded to int8 as well, row by row, except for the columns in which some value
  reaches a threshold; those are multiplied in the dtype of the input. Its gradient is straight-through: grad @ w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.kernels import cpu_int8, cpu_integer, cpu_stored, triton_backend
from finetune.kernels.operand import register_format
from finetune.kernels.products import autocast, define_products, library, owned

LEVELS = 127
"""Codes run from -127 to 127."""

EXACT_COLUMNS = (1 << 24) // (LEVELS * (LEVELS + 1))
"""Columns whose int8 products add up exactly in float32: 1032, one of the factors going down to -128."""

_STORAGE = "Tensor codes, Tensor absmax"


class Rows(NamedTuple):
    """Rows in int8 codes.

    Attributes:
        codes_MI: int8; 0 in outlier columns.
        absmax_M: float32, the largest magnitude that is no outlier.
        outlier_I: bool, the columns with an outlier in some row; None without a threshold.
    """

    codes_MI: Tensor
    absmax_M: Tensor
    outlier_I: Tensor | None = None


def quantize_rows(x_MI: Tensor, threshold: float = 0.0) -> Rows:
    """Round rows to int8: `round(x * (1 / absmax * 127))`, half to even. A row of zeros gets absmax 0 and codes 0.

    Args:
        threshold: magnitudes from this on are outliers: they do not count for absmax, and their columns get code 0 in
            every row; 0 knows none.
    """
    x_MI = x_MI.detach().float()
    outlier_I = None
    if threshold > 0:
        outlier_MI = x_MI.abs() >= threshold
        outlier_I = outlier_MI.any(dim=0)
        x_MI = x_MI.masked_fill(outlier_MI, 0)
    absmax_M = x_MI.abs().amax(dim=1)
    factor_M = torch.where(absmax_M > 0, absmax_M.reciprocal() * LEVELS, 0)
    codes_MI = (x_MI * factor_M.unsqueeze(1)).round_().to(torch.int8)
    if outlier_I is not None:
        codes_MI.masked_fill_(outlier_I, 0)
    return Rows(codes_MI, absmax_M, outlier_I)


def quantize_weight(w_OI: Tensor) -> Rows:
    """Codes int8 [.., O, I] and absmax float32 [.., O] of a weight, rounded to float16 first as bitsandbytes does."""
    w_RI = w_OI.detach().to(torch.float16).flatten(0, -2)
    rows = cpu_int8.quantize_weight(w_RI) or quantize_rows(w_RI)
    return Rows(rows[0].view(w_OI.shape), rows[1].view(w_OI.shape[:-1]))


def product(codes_MI: Tensor, codes_OI: Tensor) -> Tensor:
    """`codes_MI @ codes_OI.T` in int32, exact: float32 sums of few enough columns, added up in int32."""
    total = torch.zeros(codes_MI.shape[0], codes_OI.shape[0], dtype=torch.int32, device=codes_MI.device)
    for start in range(0, codes_MI.shape[1], EXACT_COLUMNS):
        cut = slice(start, start + EXACT_COLUMNS)
        total += (codes_MI[:, cut].float() @ codes_OI[:, cut].float().T).to(torch.int32)
    return total


def decode(codes_OI: Tensor, absmax_O: Tensor) -> Tensor:
    """`code * (absmax / 127)` in float32."""
    return codes_OI.float() * (absmax_O * (1 / LEVELS)).unsqueeze(-1)


def dequantize_int8(codes_OI: Tensor, absmax_O: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Decode to a dense weight of `shape` in float32, then cast to `dtype`. No gradient flows.

    Args:
        codes_OI: int8 [.., O, I].
        absmax_O: float32 [.., O].
    """
    return torch.ops.finetune.dequantize_int8(codes_OI, absmax_O, shape, dtype)


def linear_int8(
    x_BI: Tensor, bias_O: Tensor | None, codes_OI: Tensor, absmax_O: Tensor, threshold: float = 0.0
) -> Tensor:
    """`x_BI @ w_OI.T + bias_O` in the dtype of `x_BI`.

    The gradient flows to `x_BI` (`grad_BO @ w_OI`), and to `bias_O` where it asks for one. Under autocast `x_BI` is
    cast first.

    Args:
        threshold: 0 decodes the weight and leaves the input as it is; more is LLM.int8() with outliers from there on.
    """
    x_BI, bias_O = autocast(x_BI, bias_O)
    if threshold > 0:
        return torch.ops.finetune.llm_int8(x_BI, bias_O, codes_OI, absmax_O, threshold)
    return torch.ops.finetune.linear_int8(x_BI, bias_O, codes_OI, absmax_O, codes_OI.shape[0])


library.define(f"dequantize_int8({_STORAGE}, SymInt[] shape, ScalarType dtype) -> Tensor")
library.define("int8_product(Tensor codes_m, Tensor codes_o) -> Tensor")
torch.library.impl("finetune::int8_product", "default")(product)


@torch.library.register_fake("finetune::int8_product")
def _product_fake(codes_m: Tensor, codes_o: Tensor) -> Tensor:
    return codes_m.new_empty(codes_m.shape[0], codes_o.shape[0], dtype=torch.int32)


library.define(f"llm_int8(Tensor x, Tensor? bias, {_STORAGE}, float threshold) -> Tensor")


def reference_dequantize(codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The operator in plain torch."""
    return decode(codes, absmax).to(dtype).view(shape)


torch.library.impl("finetune::dequantize_int8", "default")(reference_dequantize)


@torch.library.register_fake("finetune::dequantize_int8")
def _dequantize_fake(codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


_products = define_products("int8", _STORAGE)


def llm_int8_by(
    multiply: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    threshold: float,
) -> Tensor:
    """LLM.int8() over a product of codes: scaled in float32, rounded once together with what the outliers add.

    Args:
        multiply: makes the exact product of codes; a backend has its own.
    """
    x_MI = x.reshape(-1, x.shape[-1])
    rows = quantize_rows(x_MI, threshold)
    scale_MO = torch.outer(rows.absmax_M, absmax) * (1 / LEVELS**2)
    y_MO = multiply(rows.codes_MI, codes).float().mul_(scale_MO)
    if bias is not None:
        y_MO += bias
    with torch.autocast(x.device.type, enabled=False):
        assert rows.outlier_I is not None
        y_MO += outlier_part(x_MI, rows.outlier_I, codes, absmax)
    return owned(y_MO.to(x.dtype).view(*x.shape[:-1], codes.shape[0]))


def reference_llm_int8(x: Tensor, bias: Tensor | None, codes: Tensor, absmax: Tensor, threshold: float) -> Tensor:
    """The operator in plain torch."""
    return llm_int8_by(product, x, bias, codes, absmax, threshold)


torch.library.impl("finetune::llm_int8", "default")(reference_llm_int8)


def outlier_part(x_MI: Tensor, outlier_I: Tensor, codes_OI: Tensor, absmax_O: Tensor) -> Tensor:
    """What the outlier columns add to the product, [M, O] in the dtype of the input, or a float32 scalar 0."""
    columns = outlier_I.nonzero().view(-1)
    if not len(columns):
        return absmax_O.new_zeros(())
    weight = decode(codes_OI.index_select(1, columns), absmax_O).to(x_MI.dtype)
    return x_MI.index_select(1, columns) @ weight.T


@torch.library.register_fake("finetune::llm_int8")
def _llm_fake(x: Tensor, bias: Tensor | None, codes: Tensor, absmax: Tensor, threshold: float) -> Tensor:
    return x.new_empty([*x.shape[:-1], codes.shape[0]])


def _save_for_llm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, codes, absmax, _ = inputs
    ctx.save_for_backward(codes, absmax)


def _llm_backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through: as if the input had not been rounded (bitsandbytes' backward too)."""
    codes, absmax = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.finetune.input_gradient_int8(grad_BO, codes, absmax, codes.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_bias = grad_BO.reshape(-1, grad_BO.shape[-1]).sum(dim=0)
    return grad_x, grad_bias, None, None, None


torch.library.register_autograd("finetune::llm_int8", _llm_backward, setup_context=_save_for_llm)


def _operand_linear(
    x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], settings: list[str], out_features: int
) -> Tensor:
    """As `operand.Product`; tensors are codes and absmax, the setting is the threshold."""
    threshold = float(settings[0])
    if threshold > 0:
        return torch.ops.finetune.llm_int8(x_BI, bias_O, *tensors, threshold)
    return torch.ops.finetune.linear_int8(x_BI, bias_O, *tensors, out_features)


def _operand_gradient(grad_BO: Tensor, tensors: list[Tensor], settings: list[str], in_features: int) -> Tensor:
    """As `operand.Gradient`."""
    return torch.ops.finetune.input_gradient_int8(grad_BO, *tensors, in_features)


register_format("int8", _operand_linear, _operand_gradient)
cpu_stored.serve("int8", cpu_integer.int8, (reference_dequantize, *_products))
cpu_int8.serve(reference_llm_int8, product, outlier_part)
for _operator in ("dequantize", "linear", "input_gradient"):
    triton_backend.register(f"{_operator}_int8", "triton_int8", _operator)
triton_backend.register("llm_int8", "triton_int8", "llm_int8")
triton_backend.register("int8_product", "triton_int8", "integer_product")

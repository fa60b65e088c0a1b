"""Operands whose columns are stored in another order than the inputs come in.

`ordered:<spec>` is any other operand with one tensor put in front: int32 [I], the input that each stored column
belongs to. GPTQ's act-order stores weights so (quant/affine_ordered.py).

Shape suffixes: B leading dimensions, I in features.
"""

from __future__ import annotations

from torch import Tensor

from finetune.kernels import operand
from finetune.kernels.operand import Operand, register_format


def ordered(stored: Operand, order_I: Tensor) -> Operand:
    """An operand whose column j is multiplied by input `order_I[j]`."""
    return stored._replace(tensors=[order_I, *stored.tensors], spec=f"ordered:{stored.spec}")


def reordered(x_BI: Tensor, order_I: Tensor) -> Tensor:
    """Inputs in the order of the stored columns."""
    return x_BI.index_select(-1, order_I)


def restored(y_BI: Tensor, order_I: Tensor) -> Tensor:
    """The inverse of `reordered`."""
    return y_BI.new_empty(y_BI.shape).index_copy_(-1, order_I.long(), y_BI)


def _linear(
    x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], settings: list[str], out_features: int
) -> Tensor:
    """As `operand.Product`."""
    order_I, *stored = tensors
    return operand.linear(reordered(x_BI, order_I), bias_O, stored, ":".join(settings), out_features)


def _gradient(grad_BO: Tensor, tensors: list[Tensor], settings: list[str], in_features: int) -> Tensor:
    """As `operand.Gradient`."""
    order_I, *stored = tensors
    return restored(operand.input_gradient(grad_BO, stored, ":".join(settings), in_features), order_I)


register_format("ordered", _linear, _gradient)

"""Operands in which some columns hold more than their codes say.

`columns:<spec>` is any other operand with two tensors put in front: int32 [K], the inputs that those columns belong to,
and a float [O, K], what is added to their weights. LLM.int8() keeps so what codes lose of small columns
(quant/int8_columns.py).

Shape suffixes: B leading dimensions, O out features, I in features, K columns that hold more.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from finetune.kernels import operand
from finetune.kernels.operand import Operand, register_format


def with_columns(stored: Operand, columns_K: Tensor, more_OK: Tensor) -> Operand:
    """An operand to whose columns `columns_K` something is added."""
    return stored._replace(tensors=[columns_K, more_OK, *stored.tensors], spec=f"columns:{stored.spec}")


def columns_part(x_BI: Tensor, columns_K: Tensor, more_OK: Tensor) -> Tensor:
    """What those columns add to the product, [B, O] in the dtype of `x_BI`. The gradient flows to `x_BI`."""
    return linear(x_BI.index_select(-1, columns_K), more_OK.to(x_BI.dtype))


def _linear(
    x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], settings: list[str], out_features: int
) -> Tensor:
    """As `operand.Product`."""
    columns_K, more_OK, *stored = tensors
    y_BO = operand.linear(x_BI, bias_O, stored, ":".join(settings), out_features)
    return y_BO + columns_part(x_BI, columns_K, more_OK)


def _gradient(grad_BO: Tensor, tensors: list[Tensor], settings: list[str], in_features: int) -> Tensor:
    """As `operand.Gradient`."""
    columns_K, more_OK, *stored = tensors
    grad_BI = operand.input_gradient(grad_BO, stored, ":".join(settings), in_features)
    return grad_BI.index_add(-1, columns_K, grad_BO @ more_OK.to(grad_BO.dtype))


register_format("columns", _linear, _gradient)

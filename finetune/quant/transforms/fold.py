"""Scale a tensor by folding factors into the norm or projection that gives it and into all that read it.

Shape suffixes: K outputs of what gives the tensor, I inputs of what reads it, O outputs, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune.quant.dense import DenseExperts, DenseLinear
from finetune.quant.transforms.search import Scaling


@torch.no_grad()
def fold(model: nn.Module, scaling: Scaling, by_I: Tensor) -> None:
    """Divide a tensor by factors where it is made, and multiply the columns of its readers by them.

    Arithmetic is in float32, and rounded to the dtype that each parameter has. What rounding does to the weight of a
    norm is made good in the columns of its readers. A channel of a norm that cannot be divided (its factor is 0, or
    would be out of range) stays as it is.

    Args:
        model: whose projections are dense frozen modules.
        by_I: float32, not 0; channels that come from one output have one factor. For a stack of experts that feeds
            another, [E, I] or [I].
    """
    source: Any = model.get_submodule(scaling.source)
    if scaling.is_norm:
        by_I = _divide_norm(source, scaling.offset, by_I)
    else:
        size = source.out_features
        by_K = by_I.new_ones(*by_I.shape[:-1], size)
        by_K[..., scaling.rows_I] = by_I
        _multiply(source, by_K.reciprocal(), columns=False)
    for name in scaling.readers:
        _multiply(model.get_submodule(name), by_I, columns=True)


def _divide_norm(norm: Any, offset: float, by_I: Tensor) -> Tensor:
    """Divide what a norm puts out; returns the factors that it was divided by in the end."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    old_I = weight.float() + offset
    stored_I = (old_I / by_I - offset).to(weight.dtype)
    new_I = stored_I.float() + offset
    done_I = old_I / new_I
    usable_I = (old_I != 0) & (new_I != 0) & done_I.isfinite()
    moved_I = None
    if bias is not None:
        moved_I = (bias.float() / torch.where(usable_I, done_I, 1.0)).to(bias.dtype)
        usable_I &= moved_I.isfinite()
        bias.copy_(torch.where(usable_I, moved_I, bias))
    weight.copy_(torch.where(usable_I, stored_I, weight))
    return torch.where(usable_I, done_I, 1.0)


def _multiply(module: Any, by: Tensor, *, columns: bool) -> None:
    """Multiply the columns of a matrix or of a stack of them, or its rows and its bias.

    Args:
        by: a factor for each of them, [.., K] or [.., I].
    """
    weight = module.weight
    stacked = isinstance(module, DenseExperts)
    transposed = isinstance(module, DenseExperts | DenseLinear) and module.transposed
    factors = by.unsqueeze(-2 if columns != transposed else -1)
    result = (weight.float() * factors.to(weight.device)).to(weight.dtype)
    if stacked or isinstance(module, DenseLinear):
        module.hold(result)
    else:
        weight.copy_(result)  # a router
    bias = None if columns else getattr(module, "bias", None)
    if bias is not None:
        bias.copy_((bias.float() * by).to(bias.dtype))

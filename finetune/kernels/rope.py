"""Rotary position embedding as one operator that is its own backward: schema, fake implementation, autograd, reference.

Su et al. 2021 (arXiv:2104.09864) in the layout of GPT-NeoX and Llama: the first half of the rotated features turns
against the second, `y1 = x1 cos1 - x2 sin1`, `y2 = x2 cos2 + x1 sin2`. Nothing is saved but cos and sin.

Shape suffixes: B rows, S positions, H heads, D features of a head, R of them rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("finetune", "FRAGMENT")
_library.define("rope(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor")


def rope(x_BSHD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """The first R features of each head rotated, in the dtype of x; contiguous.

    Args:
        x_BSHD: any strides, so a view of a projection does.
        cos_BSR, sin_BSR: in the dtype of x; B may be 1. They get no gradient.
    """
    y_BSHD: Tensor = torch.ops.finetune.rope(x_BSHD, cos_BSR, sin_BSR, False)
    return y_BSHD


def reference(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """The operator, or its transpose, in plain torch."""
    width = cos.shape[-1]
    first, second = x[..., :width].float().chunk(2, dim=-1)
    c1, c2 = cos.float().unsqueeze(-2).chunk(2, dim=-1)
    s1, s2 = sin.float().unsqueeze(-2).chunk(2, dim=-1)
    if transposed:
        s1, s2 = -s2, -s1
    rotated = torch.cat([first * c1 - second * s1, second * c2 + first * s2], dim=-1).to(x.dtype)
    return torch.cat([rotated, x[..., width:]], dim=-1).contiguous()


def _fake(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.finetune.rope(grad, *ctx.saved_tensors, not ctx.transposed), None, None, None


torch.library.impl("finetune::rope", "default")(reference)
torch.library.register_fake("finetune::rope")(_fake)
torch.library.register_autograd("finetune::rope", _backward, setup_context=_save)

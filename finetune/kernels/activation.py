"""Gated activations as one operator: schema, fake implementation, autograd, reference.

`y = act(gate) * up` (Shazeer 2020, arXiv:2002.05202), computed in float32 and rounded once. Saved for the backward are
gate and up; the activation is made again.

Shape suffixes: M rows (all leading dimensions), N features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""What `act_mul` knows, in the order of csrc/activation.cpp."""

_library = torch.library.Library("finetune", "FRAGMENT")
_library.define("act_mul(Tensor gate, Tensor up, str activation) -> Tensor")
_library.define("act_mul_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)")


def act_mul(gate_MN: Tensor, up_MN: Tensor, activation: str) -> Tensor:
    """`act(gate) * up` in their dtype.

    Args:
        gate_MN, up_MN: one shape and float dtype; the halves of one projection need no copy.
        activation: one of `ACTIVATIONS`.
    """
    y_MN: Tensor = torch.ops.finetune.act_mul(gate_MN, up_MN, activation)
    return y_MN


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The operator in plain torch."""
    return (ACTIVATIONS[activation](gate.float()) * up.float()).to(gate.dtype).contiguous()


def reference_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up in plain torch."""
    wide, g, u = gate.float(), grad.float(), up.float()
    if activation == "silu":
        s = torch.sigmoid(wide)
        value, slope = wide * s, s * (1 + wide * (1 - s))
    elif activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(wide * 0.5**0.5))
        value, slope = wide * cdf, cdf + wide * torch.exp(-0.5 * wide.square()) * (2 * torch.pi) ** -0.5
    else:
        a, b = (2 / torch.pi) ** 0.5, 0.044715
        s = torch.sigmoid(2 * a * (wide + b * wide**3))
        value, slope = wide * s, s + wide * s * (1 - s) * 2 * a * (1 + 3 * b * wide.square())
    return (g * u * slope).to(gate.dtype).contiguous(), (g * value).to(up.dtype).contiguous()


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.finetune.act_mul_backward(grad, *ctx.saved_tensors, ctx.activation), None)


torch.library.impl("finetune::act_mul", "default")(reference)
torch.library.impl("finetune::act_mul_backward", "default")(reference_backward)
torch.library.register_fake("finetune::act_mul")(_fake)
torch.library.register_fake("finetune::act_mul_backward")(_backward_fake)
torch.library.register_autograd("finetune::act_mul", _backward, setup_context=_save)

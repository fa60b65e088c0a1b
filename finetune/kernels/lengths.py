"""Outputs at learnt lengths, as DoRA takes them: `y m / n`, the bias at its own.

Liu et al. 2024 (arXiv:2402.09353) equation 5, where n is a constant (section 4.3). Written as operators because passes
over memory are what DoRA costs: one forward, in place, and one backward. Within an `autograd.Function` the compiled
kernels are called without torch's dispatcher, which would cost as much as they do over few rows.

Shape suffixes: B leading dimensions, O out features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.kernels import cpu_lengths

SHORTEST = 1e-6
"""Share of a row's length below which it has none."""

_library = torch.library.Library("finetune", "FRAGMENT")
_library.define("scale_outputs_(Tensor(a!) y, Tensor magnitude, Tensor norm, Tensor? bias) -> ()")
_library.define(
    "scale_outputs_backward(Tensor grad, Tensor scaled, Tensor magnitude, Tensor norm, Tensor? bias)"
    " -> (Tensor, Tensor)"
)


def scale_outputs_(y_BO: Tensor, magnitude_O: Tensor, norm_O: Tensor, bias_O: Tensor | None) -> None:
    """`y m / n - bias (m / n - 1)` in place; where m is n, y keeps its bits. Not recorded by autograd.

    Args:
        magnitude_O, norm_O: m and n, of one float dtype.
        bias_O: what of y is bias; in any float dtype.
    """
    if y_BO.device.type == "cpu" and not torch.compiler.is_compiling():
        return cpu_lengths.scale_outputs_(y_BO, magnitude_O, norm_O, bias_O, reference)
    torch.ops.finetune.scale_outputs_(y_BO, magnitude_O, norm_O, bias_O)
    return None


def scale_outputs_backward(
    grad_BO: Tensor, scaled_BO: Tensor, magnitude_O: Tensor, norm_O: Tensor, bias_O: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of m, the latter in the dtype of m.

    Args:
        scaled_BO: what `scale_outputs_` has left.
    """
    arguments = (grad_BO, scaled_BO, magnitude_O, norm_O, bias_O)
    if grad_BO.device.type == "cpu" and not torch.compiler.is_compiling():
        return cpu_lengths.scale_outputs_backward(*arguments, reference_backward)
    found: tuple[Tensor, Tensor] = torch.ops.finetune.scale_outputs_backward(*arguments)
    return found


def at_lengths(y_BO: Tensor, magnitude_O: Tensor, norm_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """The same out of place, as autograd and compilers follow it."""
    excess_O = ((magnitude_O.float() - norm_O.float()) / norm_O.float()).to(y_BO.dtype)
    scaled_BO = y_BO + y_BO * excess_O
    return scaled_BO if bias_O is None else scaled_BO - bias_O.to(y_BO.dtype) * excess_O


def reference(y: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> None:
    """The operator in plain torch."""
    # m / n - 1 keeps its digits in 16 bits.
    excess = ((magnitude.float() - norm.float()) / norm.float()).to(y.dtype)
    y.addcmul_(y, excess)
    if bias is not None:
        y.sub_(bias.to(y.dtype) * excess)


def reference_backward(
    grad: Tensor, scaled: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Its backward in plain torch."""
    m, n = magnitude.float(), norm.float()
    excess = ((m - n) / n).to(grad.dtype)
    product = grad * scaled
    along = product.flatten(0, -2).sum(dim=0).float()
    if bias is not None:
        along -= bias.float() * grad.flatten(0, -2).sum(dim=0).float()
    # What was scaled is found again from the result; a row of length zero has lost it, and learns nothing.
    grad_magnitude = torch.where(m.abs() < SHORTEST * n, 0.0, along / m).to(magnitude.dtype)
    return torch.addcmul(grad, grad, excess, out=product), grad_magnitude


torch.library.impl("finetune::scale_outputs_", "default")(reference)
torch.library.impl("finetune::scale_outputs_backward", "default")(reference_backward)
torch.library.register_fake("finetune::scale_outputs_")(lambda y, magnitude, norm, bias: None)
torch.library.register_fake("finetune::scale_outputs_backward")(
    lambda grad, scaled, magnitude, norm, bias: (torch.empty_like(grad), torch.empty_like(magnitude))
)

"""A frozen weight as an argument of operators that fuse something with it, whatever its storage format.

An adapter's operator (LoRA's linear, say) has to multiply by the base and by its transpose inside one operator. It
takes the base as an `Operand`: the stored tensors, and a spec that names the format and its settings. Each format says
here, beside its own operators, how its two products are made; so that methods and formats add up and never multiply.

Shape suffixes: B leading dimensions, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Product = Callable[[Tensor, Tensor | None, list[Tensor], list[str], int], Tensor]
"""`linear(x_BI, bias_O, tensors, settings, out_features) -> y_BO`, in the dtype of x."""
Gradient = Callable[[Tensor, list[Tensor], list[str], int], Tensor]
"""`input_gradient(grad_BO, tensors, settings, in_features) -> grad_BI`, in the dtype of the gradient."""


class Operand(NamedTuple):
    """A frozen weight w_OI.

    Attributes:
        tensors: what is stored, in the order that the format expects; absent ones left out.
        spec: the format and its settings, joined by colons: "codebook4:nf4:64".
        out_features, in_features: O and I.
    """

    tensors: list[Tensor]
    spec: str
    out_features: int
    in_features: int


_FORMATS: dict[str, tuple[Product, Gradient]] = {}


def register_format(name: str, linear: Product, input_gradient: Gradient) -> None:
    """Make a storage format known by the name that its specs begin with. Both functions run without autograd."""
    _FORMATS[name] = (linear, input_gradient)


def linear(x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], spec: str, out_features: int) -> Tensor:
    """`x_BI @ w_OI.T + bias_O`, not recorded by autograd."""
    name, *settings = spec.split(":")
    return _FORMATS[name][0](x_BI, bias_O, tensors, settings, out_features)


def input_gradient(grad_BO: Tensor, tensors: list[Tensor], spec: str, in_features: int) -> Tensor:
    """`grad_BO @ w_OI`, not recorded by autograd."""
    name, *settings = spec.split(":")
    return _FORMATS[name][1](grad_BO, tensors, settings, in_features)

"""The oracle of gradients: the same model and adapter in float64, over the weights that the base decodes to.

A base that rounds activations (LLM.int8(), w8a8) is given the codes and outliers that the float32 model met, so that no
value falls on the other side of a rounding boundary; the gradient passes straight through. So does each ReLU take the
side that it took there: where an input is nothing but rounding, both derivatives are right.

Shape suffixes: B leading dimensions, N rows (B flattened), O out features, I in features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finetune.kernels import int8, w8a8
from finetune.kernels.operand import Operand, register_format
from finetune.quant.base import QUANTIZERS, FrozenWeight
from finetune.quant.dense import DenseConfig, DenseLinear
from finetune.quant.int8 import Int8Linear
from finetune.quant.w8a8 import IntegerLinear
from finetune.structure import Projection, inspect


class StraightThrough(DenseLinear):
    """A dense layer that multiplies what it was given to meet, whatever comes, and passes gradients on as a dense one.

    Attributes:
        met: the rounded input [B, I]; None multiplies what comes.
    """

    met: Tensor | None = None

    def forward(self, x_BI: Tensor) -> Tensor:
        met = x_BI if self.met is None else x_BI + (self.met - x_BI).detach()
        return super().forward(met)

    def operand(self) -> Operand:
        dense = super().operand()
        return dense if self.met is None else dense._replace(tensors=[*dense.tensors, self.met], spec="met")


def _product(x: Tensor, bias: Tensor | None, tensors: list[Tensor], settings: list[str], out: int) -> Tensor:
    weight_OI, met_BI = tensors
    # DoRA multiplies its factors by the base as well, which are no activations.
    return nn.functional.linear(met_BI if met_BI.shape == x.shape else x, weight_OI, bias)


class SameSide(nn.Module):
    """A ReLU that lets through what another one did; they may differ in nothing but rounding."""

    def __init__(self, through: Tensor) -> None:
        super().__init__()
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        assert bool((x[(x > 0) != self.through].abs() <= 1e-5 * x.abs().max()).all()), "a ReLU reads something else"
        return x * self.through


register_format("met", _product, lambda grad, tensors, settings, features: grad @ tensors[0])


def rounded(x_BI: Tensor, threshold: float) -> Tensor:
    """What LLM.int8() makes of an input, in float64: codes times their scale, outlier columns as they are."""
    rows = int8.quantize_rows(x_BI.flatten(0, -2), threshold)
    met_NI = rows.codes_MI.double() * (rows.absmax_M.double() / int8.LEVELS)[:, None]
    if rows.outlier_I is not None:
        met_NI = torch.where(rows.outlier_I, x_BI.flatten(0, -2).double(), met_NI)
    return met_NI.view(x_BI.shape)


def in_integers(x_BI: Tensor, layer: IntegerLinear) -> Tensor:
    """What a layer of w8a8, w6a6 or w4a8 makes of an input, in float64: codes times their scale."""
    x_NI, most = x_BI.flatten(0, -2), w8a8.levels(layer.input_bits)
    scale = w8a8.input_scale(x_NI, layer.input_bits, layer.inputs == "token", layer.input_scale)
    return (w8a8.round_to(x_NI, scale, -most - 1, most).double() * scale.double()).view(x_BI.shape)


def what_it_meets(layer: nn.Module, x_BI: Tensor) -> Tensor | None:
    """The input that a layer multiplies after rounding; None where it rounds none."""
    if isinstance(layer, IntegerLinear):
        return in_integers(x_BI, layer)
    if isinstance(layer, Int8Linear) and layer.threshold > 0:
        return rounded(x_BI, layer.threshold)
    return None


@contextmanager
def meetings(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it the inputs that layers with rounded activations meet are kept, by the name of the projection.

    An adapter may hand its base something else than it was handed itself: what the base meets counts.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for p in inspect(model).projections:
        module = model.get_submodule(p.name)
        base = getattr(module, "base", module)

        def keep(_module: nn.Module, args: tuple, name: str = p.name, layer: nn.Module = base) -> None:
            met = what_it_meets(layer, args[0].detach())
            if met is not None:
                found[name] = met

        if isinstance(base, Int8Linear | IntegerLinear):
            handles += [each.register_forward_pre_hook(keep) for each in dict.fromkeys((module, base))]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def sides(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it what every ReLU lets through is kept, by its name."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        found[name] = output.detach() > 0

    relus = [(name, module) for name, module in model.named_modules() if type(module) is nn.ReLU]
    handles = [m.register_forward_hook(lambda _module, _args, y, name=name: keep(name, y)) for name, m in relus]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def in_float64(model: nn.Module) -> nn.Module:
    """The decoded model, dense and in float64."""
    twin = copy.deepcopy(model)
    for p in inspect(twin).projections:
        module = twin.get_submodule(p.name)
        if isinstance(module, FrozenWeight):
            twin.set_submodule(p.name, _dense(module, p))
    return twin.double()


def _dense(module: nn.Module, p: Projection) -> nn.Module:
    sizes, common = (module.out_features, module.in_features), {"dtype": torch.float64, "transposed": p.transposed}
    if p.kind == "experts":
        plain = QUANTIZERS.build(DenseConfig(), *sizes, experts=module.num_experts, **common)
    else:
        plain = StraightThrough(*sizes, bias=module.bias is not None, **common)
        plain.bias = None if module.bias is None else nn.Parameter(module.bias.double(), requires_grad=False)
    plain.store(module.dequantize(torch.float64))
    return plain


def widen(twin: nn.Module, trainable: dict[str, nn.Parameter]) -> None:
    """Bring what an adapter has put into a float64 model to float64."""
    for parameter in trainable.values():
        parameter.data = parameter.data.double()
    for module in twin.modules():  # what trains in copies computes in the dtype of what it stands for
        if hasattr(module, "steps"):
            module.dtype, module.steps = torch.float64, ()


def meet(twin: nn.Module, met: dict[str, Tensor]) -> None:
    """Hand the float64 model what the float32 one met."""
    for name, x_BI in met.items():
        module = twin.get_submodule(name)
        getattr(module, "base", module).met = x_BI
        if hasattr(module, "packed"):  # what trains a whole weight adds the change to the product of codes
            module.packed = True


def take_sides(twin: nn.Module, found: dict[str, Tensor]) -> None:
    """Have each ReLU of the float64 model let through what that of the float32 one did."""
    for name, through in found.items():
        twin.set_submodule(name, SameSide(through))

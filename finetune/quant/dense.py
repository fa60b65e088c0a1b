"""Dense: the frozen base stays in the floating-point dtype it was loaded in.

Shape suffixes: O out features, I in features, E experts, B leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.kernels.operand import Operand, register_format
from finetune.quant.base import QUANTIZERS, FrozenExperts, FrozenLinear, FrozenWeight, QuantConfig


@dataclass
class DenseConfig(QuantConfig):
    """No quantization."""

    rounds: ClassVar[bool] = False

    name: str = "none"


class _Dense(FrozenWeight):
    """A parameter in the layout it had: [.., O, I], or [.., I, O] where `transposed`."""

    weight: nn.Parameter
    transposed: bool

    def hold(self, weight: Tensor) -> None:
        """Take a tensor in this module's own layout as its weight, without a copy."""
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def bits_per_weight(self) -> float:
        return 8.0 * self.weight.element_size()


class DenseLinear(_Dense, FrozenLinear):
    """A frozen dense linear layer. State keys and layout are those of the layer it stands for.

    Args:
        transposed: it stands for a Conv1D, whose parameter is [I, O].
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.transposed = out_features, in_features, transposed
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.hold(torch.empty(shape, dtype=dtype, device=device))
        value = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if value is None else nn.Parameter(value, requires_grad=False))

    @property
    def _weight_OI(self) -> Tensor:
        return self.weight.T if self.transposed else self.weight

    def forward(self, x_BI: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x_BI.device.type):
            return functional.linear(x_BI, self._weight_OI, self.bias)
        bias_O = None if self.bias is None else self.bias.to(x_BI.dtype)
        return functional.linear(x_BI, self._weight_OI.to(x_BI.dtype), bias_O)

    def store(self, weight: Tensor) -> None:
        """Take a dense weight [O, I], cast to this module's dtype, on its device (the weight's where it is on meta)."""
        device = weight.device if self.weight.is_meta else self.weight.device
        weight = weight.to(device=device, dtype=self.weight.dtype)
        self.hold(weight.T if self.transposed else weight)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self._weight_OI.detach().to(dtype)

    def cleared(self) -> Tensor:
        return self._weight_OI == 0

    def operand(self) -> Operand:
        return Operand([self._weight_OI], "dense", self.out_features, self.in_features)

    def requantize(self, w_OI: Tensor) -> DenseLinear:
        new = DenseLinear(
            self.out_features,
            self.in_features,
            bias=self.bias is not None,
            dtype=self.weight.dtype,
            device="meta",
            transposed=self.transposed,
        )
        new.store(w_OI.to(self.weight.device))
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return new

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {str(self.weight.dtype).removeprefix('torch.')}"


class DenseExperts(_Dense, FrozenExperts):
    """A frozen dense stack of expert projections. Its one state key is that of the parameter it stands for.

    So the frozen model is saved under the names of the dense one. The reverse goes through the dense model: load, then
    freeze; torch hands a child only keys that begin with its own name and a dot.

    Args:
        transposed: the parameter is [E, I, O].
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        experts: int,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.transposed = experts, transposed
        self.out_features, self.in_features = out_features, in_features
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.hold(torch.empty(experts, *shape, dtype=dtype, device=device))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        return self.weight[expert]

    def store(self, weight: Tensor) -> None:
        """Take a dense stack in the layout of the parameter, cast to this module's dtype."""
        device = weight.device if self.weight.is_meta else self.weight.device
        self.hold(weight.to(device=device, dtype=self.weight.dtype))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.detach().to(dtype)

    def cleared(self) -> Tensor:
        return self.weight == 0

    def requantize(self, w_EOI: Tensor) -> DenseExperts:
        new = DenseExperts(
            self.out_features,
            self.in_features,
            experts=self.num_experts,
            dtype=self.weight.dtype,
            device="meta",
            transposed=self.transposed,
        )
        new.store(w_EOI.to(self.weight.device))
        return new

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix.removesuffix(".")] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing_keys, _, error_msgs = rest
        key = prefix.removesuffix(".")
        value = state_dict.get(key)
        if value is None:
            missing_keys.append(key)
        elif value.shape != self.weight.shape:
            error_msgs.append(f"{key} has shape {list(value.shape)}, expected {list(self.weight.shape)}")
        else:
            self.store(value)


@QUANTIZERS.register(DenseConfig)
def build(
    config: DenseConfig, out_features: int, in_features: int, *, bias: bool = False, experts: int = 0, **options: Any
) -> DenseLinear | DenseExperts:
    """An empty dense linear, or with `experts` an empty stack."""
    if experts:
        return DenseExperts(out_features, in_features, experts=experts, **options)
    return DenseLinear(out_features, in_features, bias=bias, **options)


def _operand_linear(
    x_BI: Tensor, bias_O: Tensor | None, tensors: list[Tensor], settings: list[str], out_features: int
) -> Tensor:
    """As `operand.Product`; the one tensor is w_OI in its own dtype."""
    bias_O = None if bias_O is None else bias_O.to(x_BI.dtype)
    return functional.linear(x_BI, tensors[0].to(x_BI.dtype), bias_O)


def _operand_gradient(grad_BO: Tensor, tensors: list[Tensor], settings: list[str], in_features: int) -> Tensor:
    """As `operand.Gradient`."""
    return grad_BO @ tensors[0].to(grad_BO.dtype)


register_format("dense", _operand_linear, _operand_gradient)

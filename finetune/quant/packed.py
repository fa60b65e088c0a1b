"""What all frozen modules have in common that store codes and scales: life cycle, dtype, device, state dict.

Shape suffixes: O out features, I in features, E experts.

A format supplies its tensors (`encode`, `decode`), its settings and its keys on disk; a linear layer and a stack of
experts come from it by inheriting `PackedLinear` or `PackedExperts` as well.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError, ModelError
from finetune.kernels.operand import Operand
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight, QuantConfig
from finetune.quant.grid import Grid
from finetune.quant.packed_expert import PackedExpert

CHUNK = 1 << 22
"""Weights that are encoded at a time: what bounds the temporaries."""


class PackedWeight(FrozenWeight):
    """Codes and scales as parameters in their storage dtype.

    Attributes:
        stored: names of those parameters, in the order in which kernels take them; some may be None.
        storage: name of the format, for people.
        shape: of the weight as its codes run: (O, I) or (E, O, I).
        dtype: of the weight this stands for; what `.to(dtype)` changes, beside the bias.
    """

    stored: ClassVar[tuple[str, ...]]
    storage: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.out_features, self.in_features = shape[-2:]

    @abstractmethod
    def encode(self, weight: Tensor) -> Sequence[Tensor | None]:
        """The stored tensors of a weight in the layout of the codes, on its device.

        Raises:
            ModelError: when a weight is not finite.
        """

    @abstractmethod
    def fit(self, weight: Tensor) -> Grid:
        """The grid on which this module would store a weight, given in the layout of the codes and on its device.

        `encode` takes the codes nearest on it; bitsandbytes' double quantization excepted (quant/codebook4_grid.py).

        Raises:
            ModelError: when a weight is not finite.
        """

    def fit_clipped(self, weight: Tensor) -> Grid:
        """As `fit`, with the outermost weights of each group clipped where that lessens the error of the group.

        Raises:
            ConfigError: where the format has no such search.
        """
        raise ConfigError(f"{self.storage} has no search for the scales of its groups: expected an integer format")

    @abstractmethod
    def take(self, grid: Grid, codes: Tensor) -> None:
        """Hold codes of a grid that `fit` gave, in the layout of the codes, [.., O, I], in its dtype for them."""

    def see_inputs(self, largest: Tensor | None) -> None:
        """Told before it is filled how large inputs it has to represent, by calibration; None where it saw none.

        Raises:
            ModelError: where the format cannot do without.
        """

    @abstractmethod
    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weight in the layout of the codes."""

    @abstractmethod
    def settings(self) -> QuantConfig:
        """The settings of this module, which a checkpoint may have changed."""

    @abstractmethod
    def like(self, settings: QuantConfig) -> Self:
        """A module of the same shape, dtype and device, with the same bias, whose weight is still to be filled."""

    @abstractmethod
    def packed_state(self) -> dict[str, Tensor]:
        """What is saved, by key, without the bias; stored tensors are shared, not copied."""

    @abstractmethod
    def take_state(self, state: dict[str, Tensor], name: str = "") -> None:
        """Fill this module from what `packed_state` gave, and take over the settings that it says.

        The module keeps its device, or takes that of the tensors where it is on meta.

        Args:
            name: prefix for messages.

        Raises:
            ModelError: when a key is missing or a tensor does not fit the module, naming the key.
        """

    def hold(self, tensors: Sequence[Tensor | None]) -> None:
        """Take packed tensors as this module's own, without a copy."""
        for name, tensor in zip(self.stored, tensors, strict=True):
            value = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, value)

    def store(self, weight: Tensor) -> None:
        """Quantize a dense weight into this module, on its own device, or on the weight's where this one is on meta.

        A linear takes [O, I]; experts take the layout of the parameter they stand for, [E, O, I] or [E, I, O].

        Raises:
            ModelError: when a weight is not finite.
        """
        mine = self._parameters["weight"]
        assert mine is not None
        device = weight.device if mine.is_meta else mine.device
        self.hold(self.encode(self.codes_layout(weight.to(device))))

    def bits_per_weight(self) -> float:
        held = (self._parameters[name] for name in self.stored)
        return 8 * sum(p.numel() * p.element_size() for p in held if p is not None) / prod(self.shape)

    @property
    def rows_at_a_time(self) -> int:
        """Rows that are encoded at a time."""
        return max(1, CHUNK // self.in_features)

    def row_parts(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The rows of a weight in the layout of the codes, those of all experts behind one another, some at a time."""
        return weight.reshape(-1, self.in_features).split(self.rows_at_a_time)

    def _not_finite(self) -> ModelError:
        return ModelError(f"a weight of shape {list(self.shape)} holds NaN or infinity: it cannot be quantized")

    def _requantized(self, weight: Tensor, empty: Self) -> Self:
        """`empty` filled with `weight`; with the stored bits where nothing changed."""
        if torch.equal(self.codes_layout(weight).float(), self.decode(torch.float32).to(weight.device)):
            empty.hold([self._parameters[name] for name in self.stored])
        else:
            empty.store(weight)
        return empty

    def codes_layout(self, weight: Tensor) -> Tensor:
        """A weight in the order in which its codes run.

        Raises:
            ValueError: when its shape is another than this module's.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"a weight of shape {list(weight.shape)} cannot be stored as {list(self.shape)}")
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but keep codes and scales in their storage dtype whatever `.to(dtype)` asks."""
        held = {name: self._parameters[name] for name in self.stored}
        before = {name: p.data for name, p in held.items() if p is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        for name, data in before.items():
            moved = self._parameters[name]
            assert moved is not None
            if moved.dtype != data.dtype:
                self.register_parameter(name, nn.Parameter(data.to(moved.device), requires_grad=False))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        bias, weight = self._parameters.get("bias"), self._parameters["weight"]
        assert weight is not None
        if bias is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()
        if weight.is_meta:
            # Not filled yet: a loader that asks which keys it must find is told the dense one.
            destination[prefix + "weight"] = weight if keep_vars else weight.detach()
            return
        for key, tensor in self.packed_state().items():
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        bias = self._parameters.get("bias")
        if bias is not None and "bias" not in mine:
            missing_keys.append(prefix + "bias")
        elif bias is not None:
            value = mine.pop("bias").to(device=None if bias.is_meta else bias.device, dtype=bias.dtype)
            if value.shape != bias.shape:
                error_msgs.append(f"{prefix}bias has shape {list(value.shape)}, expected {list(bias.shape)}")
            self.register_parameter("bias", nn.Parameter(value, requires_grad=bias.requires_grad))
        weight = {key: value for key, value in mine.items() if self._is_key(key)}
        unexpected_keys.extend(prefix + key for key in mine if key not in weight)
        if not weight:
            missing_keys.append(prefix + "weight")
            return
        try:
            self.take_state(weight, prefix)
        except ModelError as error:
            error_msgs.append(str(error))

    def _is_key(self, key: str) -> bool:
        """Whether a key of the state, relative to this module, belongs to the weight."""
        return key.split(".")[0] == "weight"


class PackedLinear(PackedWeight, FrozenLinear):
    """A linear layer whose weight is stored in codes.

    Args:
        transposed: this stands for a Conv1D, whose parameter is [I, O]; the codes run over [O, I] nevertheless, as
            bitsandbytes has it.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        config: Any,
        out_features: int,
        in_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(config, (out_features, in_features), dtype, device)  # type: ignore[call-arg,arg-type]
        self.transposed = transposed
        value = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if value is None else nn.Parameter(value, requires_grad=False))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.decode(dtype)

    def requantize(self, w_OI: Tensor) -> Self:
        return self._requantized(w_OI, self.like(self.settings()))

    def like(self, settings: QuantConfig) -> Self:
        empty = type(self)(
            settings,
            self.out_features,
            self.in_features,
            bias=self.bias is not None,
            dtype=self.dtype,
            device=next(self.parameters()).device,
            transposed=self.transposed,
        )
        if self.bias is not None:
            empty.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return empty

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.storage}"


class PackedExperts(PackedWeight, FrozenExperts):
    """A stack of expert projections whose codes run over [E, O, I].

    Args:
        transposed: the parameter this stands for is [E, I, O]; `store`, `experts[e]`, `dequantize` and `requantize`
            speak that layout.
    """

    def __init__(
        self,
        config: Any,
        out_features: int,
        in_features: int,
        *,
        experts: int,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(config, (experts, out_features, in_features), dtype, device)  # type: ignore[call-arg,arg-type]
        self.num_experts = experts
        self.transposed = transposed

    @abstractmethod
    def decode_expert(self, expert: int) -> Tensor:
        """The dense w_OI of one expert, in the module's dtype."""

    @abstractmethod
    def expert_operand(self, expert: int) -> Operand | None:
        """One expert as operators take it; None where its codes cannot be cut out of the stack."""

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """One expert as a `PackedExpert`, decoded where it is used: with or without a graph, for the same bits."""
        index = int(expert)
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert {index} of {self.num_experts}")
        operand = self.expert_operand(index)
        if operand is None:
            w_OI = self.decode_expert(index)
            return w_OI.T if self.transposed else w_OI
        return cast(Tensor, PackedExpert(operand, lambda: self.decode_expert(index), self.transposed))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        w_EOI = self.decode(dtype)
        return w_EOI.transpose(1, 2).contiguous() if self.transposed else w_EOI

    def requantize(self, w_EOI: Tensor) -> Self:
        return self._requantized(w_EOI, self.like(self.settings()))

    def like(self, settings: QuantConfig) -> Self:
        return type(self)(
            settings,
            self.out_features,
            self.in_features,
            experts=self.num_experts,
            dtype=self.dtype,
            device=next(self.parameters()).device,
            transposed=self.transposed,
        )

    def codes_layout(self, weight: Tensor) -> Tensor:
        return super().codes_layout(weight.transpose(-1, -2) if self.transposed else weight)

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features}, {self.out_features}), {self.storage}"


def builder(linear: type[PackedLinear], stack: type[PackedExperts]) -> Callable[..., PackedWeight]:
    """What a format registers: it builds an empty linear, or with `experts` an empty stack."""

    def build(
        config: Any, out_features: int, in_features: int, *, bias: bool = False, experts: int = 0, **options: Any
    ) -> PackedWeight:
        if experts:
            return stack(config, out_features, in_features, experts=experts, **options)
        return linear(config, out_features, in_features, bias=bias, **options)

    return build

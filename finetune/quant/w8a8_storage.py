"""What frozen modules in w8a8, w6a6 and w4a8 have in common: settings, storage, state in compressed-tensors' keys.

Shape suffixes: O out features, I in features, E experts, G groups of a row.

Keys on disk, relative to a module: `weight` (int8 [.., O, I]; codes of 6 and 4 bits take 8 as well), `weight_scale`
(float32 [.., O, G] by channel; [1], or [E, 1, 1] of experts, by tensor), and where inputs have a static scale
`input_scale` (float32 [1]): compressed-tensors' `int-quantized` layout (compressed-tensors 0.20,
compressors/naive_quantized). Stacks of experts have the same keys; compressed-tensors has no such module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError, ModelError
from finetune.kernels import w8a8
from finetune.kernels.operand import Operand
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.facts import FLOATS, reader
from finetune.quant.grid import Grid
from finetune.quant.packed import PackedWeight
from finetune.quant.w8a8_grid import W8A8Grid, survivable

BITS = {"w8a8": (8, 8), "w6a6": (6, 6), "w4a8": (4, 8)}
"""Of a weight and of an input."""
LEAST_MAGNITUDE = 1e-5
"""What the largest magnitude of an input is taken for at least where it is to last: it may be zero in calibration."""


@dataclass
class IntegerConfig(QuantConfig):
    """Settings that w8a8, w6a6 and w4a8 share; their names say how many bits the codes of weights and inputs have.

    SmoothQuant (Xiao et al. 2022, arXiv:2211.10438), table 2: O1 is weights=tensor activations=token, O2
    weights=tensor activations=tensor, O3 that and static=true. ZeroQuant (Yao et al. 2022, arXiv:2206.01861) is
    activations=token with a group_size.

    Attributes:
        weights: channel | tensor: what shares a scale, the inputs of one output or the whole matrix.
        group_size: with weights=channel, the inputs of one output that share a scale, -1 for all; it has to divide the
            inputs of every layer that has more than that.
        activations: token | tensor: the same of inputs, one row or all rows of a call.
        static: one scale for all inputs of a layer, found in calibration; inputs beyond it are clipped.
        clip: none | token_wise: what a static scale spans, the largest input, or what leaves the least error of the
            layer's output (Outlier Suppression's search, quant/token_clip.py).
        head: quantize the output head as well; a head tied to the embeddings cannot be.
    """

    at_will: ClassVar[tuple[str, ...]] = ("activations", "clip")

    weights: str = "channel"
    activations: str = "token"
    static: bool = False
    head: bool = False
    group_size: int = -1
    clip: str = "none"

    def __post_init__(self) -> None:
        if self.weights not in ("channel", "tensor"):
            raise ConfigError(f"quant.weights is {self.weights}: expected channel or tensor")
        if self.activations not in ("token", "tensor"):
            raise ConfigError(f"quant.activations is {self.activations}: expected token or tensor")
        if self.static and self.activations == "token":
            raise ConfigError("quant.static=true fixes one scale for all tokens: expected quant.activations=tensor")
        if self.clip not in ("none", "token_wise"):
            raise ConfigError(f"quant.clip is {self.clip}: expected none or token_wise")
        if self.clip != "none" and not self.static:
            raise ConfigError(
                f"quant.clip={self.clip} searches static scales: expected quant.static=true, or clip=none"
            )
        if self.group_size != -1 and self.group_size < 2:
            raise ConfigError(f"quant.group_size is {self.group_size}: expected 2 or more, or -1 for whole rows")
        if self.group_size != -1 and self.weights == "tensor":
            raise ConfigError(
                f"quant.group_size={self.group_size} gives groups of a row a scale, and quant.weights=tensor one to the"
                " whole matrix: expected quant.weights=channel, or group_size=-1"
            )

    @property
    def bits(self) -> int:
        """Of a code of the weight."""
        return BITS[self.name][0]

    @property
    def input_bits(self) -> int:
        """Of a code of the input."""
        return BITS[self.name][1]

    @property
    def needs_inputs(self) -> bool:
        """A static scale is that of inputs seen in calibration."""
        return self.static

    @property
    def clipped_bits(self) -> int:
        """As `clip` says."""
        return self.input_bits if self.clip == "token_wise" else 0


class Integer(PackedWeight):
    """Storage common to the linear and the experts.

    Attributes:
        weight: int8 [.., O, I].
        weight_scale: float32 [.., O, G], or one for the matrix ([1]) or for each expert ([E, 1, 1]).
        input_scale: float32 [1] once a static scale is known; else None.
        inputs: token | tensor | static | none: how inputs are rounded; none only while `uncoupled`.
    """

    stored = ("weight", "weight_scale", "input_scale")
    weight: nn.Parameter
    weight_scale: nn.Parameter
    input_scale: nn.Parameter | None

    def __init__(self, config: IntegerConfig, shape: tuple[int, ...], dtype: torch.dtype, device: Any = None) -> None:
        super().__init__(shape, dtype)
        self.storage, self.bits, self.input_bits = config.name, config.bits, config.input_bits
        self.group_size = config.group_size
        if self.in_features % self._columns and self.in_features > self._columns:
            common = math.gcd(self.in_features, self.group_size)
            raise ConfigError(
                f"quant.group_size={self.group_size} does not divide the {self.in_features} inputs of a layer: expected"
                f" {f'{common}, or ' if common > 1 else ''}-1 for whole rows"
            )
        self.by_tensor = config.weights == "tensor"
        self.inputs = "static" if config.static else config.activations
        codes = torch.zeros(shape, dtype=torch.int8, device=device)
        self.hold([codes, torch.zeros(self._scale_shape(), dtype=torch.float32, device=device), None])

    def _scale_shape(self) -> tuple[int, ...]:
        """Of `weight_scale`."""
        if self.by_tensor:
            return (*self.shape[:-2], 1, 1) if len(self.shape) > 2 else (1,)
        return (*self.shape[:-1], self.in_features // self._columns)

    @property
    def _columns(self) -> int:
        """Under one scale."""
        return self.in_features if self.group_size < 0 else min(self.group_size, self.in_features)

    def encode(self, weight: Tensor) -> Sequence[Tensor | None]:
        grid, rows = self.fit(weight), self.row_parts(weight)
        width = grid.scale.shape[-1]
        scales = grid.scale.expand(*self.shape[:-1], width).reshape(-1, width).split(self.rows_at_a_time)
        codes = [replace(grid, scale=s).round_columns(part, 0) for part, s in zip(rows, scales, strict=True)]
        return [torch.cat(codes).view(self.shape), grid.scale, self.input_scale]

    def fit(self, weight: Tensor) -> W8A8Grid:
        within = (-2, -1) if self.by_tensor else -1
        laid = weight if self.by_tensor else weight.unflatten(-1, (-1, self._columns))
        largest = torch.maximum(laid.amax(within), -laid.amin(within)).float().view(self._scale_shape())
        if not largest.isfinite().all():
            raise self._not_finite()
        return W8A8Grid(survivable(largest / w8a8.levels(self.bits), self.dtype), self.bits, self._columns)

    def take(self, grid: Grid, codes: Tensor) -> None:
        assert isinstance(grid, W8A8Grid)
        self.hold([codes, grid.scale, self.input_scale])

    def decode(self, dtype: torch.dtype) -> Tensor:
        return w8a8.dequantize_w8a8(self.weight, self.weight_scale, list(self.shape), dtype)

    def as_operand(self, codes_OI: Tensor, scale: Tensor, inputs: str) -> Operand:
        """Stored tensors of one matrix as operators take them.

        Args:
            inputs: token | tensor | static | none: how the inputs of this product are rounded.
        """
        fixed = [self.input_scale] if inputs == "static" and self.input_scale is not None else []
        return Operand(
            [codes_OI, scale, *fixed], f"w8a8:{self.input_bits}:{inputs}", self.out_features, self.in_features
        )

    @contextmanager
    def uncoupled(self) -> Iterator[None]:
        """Weight-only: with one scale for a call the largest input in it decides how all its rows are rounded."""
        inputs, self.inputs = self.inputs, "none"
        try:
            yield
        finally:
            self.inputs = inputs

    def settings(self) -> IntegerConfig:
        kind: Any = QUANTIZERS.type_of(self.storage)
        static = self.inputs == "static"
        return kind(
            weights="tensor" if self.by_tensor else "channel",
            activations="tensor" if static else self.inputs,
            static=static,
            group_size=self.group_size,
        )

    def packed_state(self) -> dict[str, Tensor]:
        held = ((name, self._parameters[name]) for name in self.stored)
        return {name: tensor.detach() for name, tensor in held if tensor is not None}

    def take_state(self, state: dict[str, Tensor], name: str = "") -> None:
        tensor = reader(state, name, self.weight)
        codes = tensor("weight", self.shape, torch.int8)
        scale = tensor("weight_scale", self._scale_shape(), *FLOATS.values()).float()
        static = tensor("input_scale", (1,), *FLOATS.values()).float() if self._holds_input_scale() else None
        if static is None and "input_scale" in state:
            raise ModelError(f"{name}input_scale is in the checkpoint, but the settings say {self.inputs} scales")
        self.hold([codes, scale, static])

    def _holds_input_scale(self) -> bool:
        """Whether a scale for inputs belongs to the state."""
        return self.inputs == "static"

    def _is_key(self, key: str) -> bool:
        return key in self.stored

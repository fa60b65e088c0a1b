"""DoRA: the rows of W + s B A get learnt lengths, `w'_O = m_O (W + s B A)_O / ||(W + s B A)_O||`.

Liu et al. 2024 (arXiv:2402.09353): equation 5; the norm is a constant in the backward pass (section 4.3). m starts as
the row norms of the base as it is stored, decoded where it is quantized, so that the adapted model starts as the base.
Dropout acts on the input of A alone.

The norms are found without W + s B A: `||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T` for a row w of W
and b of B. The first is kept, the second is a product of the stored weight with R rows, the third is small.

Shape suffixes: B leading dimensions, O out features, I in features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters import peft_format
from finetune.adapters.base import ADAPTERS
from finetune.adapters.lora import LoRAAdapter, LoRAConfig
from finetune.adapters.lora import build as build_lora
from finetune.adapters.lora_layers import LoRALinear
from finetune.adapters.peft_lora import Saved, read_saved
from finetune.adapters.weight import WeightAdapter
from finetune.kernels import operand
from finetune.kernels.dora import dora_linear
from finetune.kernels.lengths import at_lengths
from finetune.kernels.products import autocast
from finetune.quant.base import FrozenExperts, FrozenLinear
from finetune.structure import Projection
from finetune.structure.flow import trace

EXACT = 1e-5
"""Relative error of the stored weight's own product in float32 up to which norms are found by it. Formats that round
activations are off by a percent; there the weight is decoded instead."""


@dataclass
class DoRAConfig(LoRAConfig):
    """LoRA's settings; stacked experts and the token embedding have no form here."""

    embeds: ClassVar[bool] = False

    name: str = "dora"

    def read(self, directory: Path) -> Saved:
        """Refuse a plain LoRA, whose file has no magnitudes."""
        return read_saved(directory, dora=True)


class DoRALinear(LoRALinear):
    """LoRA with a learnt length for each row of the sum.

    Attributes:
        lora_magnitude_vector: m_O, named as in PEFT.
        squares_O: ||w||^2 of each row of the base, float32; derived, so it is not saved.
    """

    over: ClassVar[bool] = False  # its norms are those of the stored weight

    squares_O: Tensor

    def __init__(self, base: FrozenLinear, *, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base, rank=rank, scaling=scaling, dropout=dropout)
        w_OI = base.dequantize(torch.float32)
        self.register_buffer("squares_O", w_OI.square().sum(dim=1), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.squares_O.sqrt())
        probe_RI = self.lora_A.weight.detach().to(w_OI)
        wanted_RO, found_RO = probe_RI @ w_OI.T, self._stored_product(probe_RI)
        self.exact = w_OI.is_meta or bool((found_RO - wanted_RO).norm() <= EXACT * wanted_RO.norm())
        self._kept: tuple[Any, Tensor] | None = None
        self.overwritten = True
        """Whether the model may write into the output, which the backward pass needs as it was."""

    def adapted(self, x_BI: Tensor) -> Tensor:
        """m / n (W x + s B A dropout(x)) + bias, in the dtype of x; n is the norm."""
        dropout = self.dropout if self.training else 0.0
        if self.pruned_base() is not None:
            y_BO = self._masked(x_BI, dropout)
            return at_lengths(y_BO, self.lora_magnitude_vector, self.norm(y_BO.dtype), self.bias)
        x_BI, bias_O = autocast(x_BI, self.bias)
        factors = self.lora_A.weight, self.lora_B.weight, self.scaling
        lengths = self.lora_magnitude_vector, self.norm(x_BI.dtype)
        scaled_BO = dora_linear(x_BI, bias_O, self.base.operand(), *factors, *lengths, dropout=dropout)
        return scaled_BO.clone() if self.overwritten and scaled_BO.requires_grad else scaled_BO

    def norm(self, dtype: torch.dtype) -> Tensor:
        """Row norms of W + s B A, in the dtype of m: so rounding m on its own does not move the start.

        Found anew whenever the model trains; while it does not, kept until a factor is written to.

        Args:
            dtype: in which the product of A with the base is computed.
        """
        a_RI, b_OR = self.lora_A.weight, self.lora_B.weight
        if self.training:
            self._kept = None  # optimizers may write without a trace
            return self._norm(a_RI, b_OR, dtype)
        state = (a_RI._version, b_OR._version, a_RI.data_ptr(), b_OR.data_ptr(), dtype)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self._norm(a_RI, b_OR, dtype))
        return self._kept[1]

    @torch.no_grad()
    def _norm(self, a_RI: Tensor, b_OR: Tensor, dtype: torch.dtype) -> Tensor:
        a_RI32, b_RO32 = a_RI.float(), b_OR.float().T
        product_RO = self._product(a_RI.to(dtype)).float()
        cross_RO = torch.addmm(product_RO, a_RI32 @ a_RI32.T, b_RO32, beta=2, alpha=self.scaling)
        added_O = cross_RO.mul_(b_RO32).sum(dim=0)
        norm_O = torch.add(self.squares_O, added_O, alpha=self.scaling).clamp_min_(1e-30).sqrt_()
        return norm_O.to(self.lora_magnitude_vector.dtype)

    def _product(self, a_RI: Tensor) -> Tensor:
        """A W^T, [R, O]."""
        if self.exact:
            return self._stored_product(a_RI)
        return a_RI.float() @ self.base.dequantize(torch.float32).T

    def _stored_product(self, a_RI: Tensor) -> Tensor:
        weight = self.base.operand()
        return operand.linear(a_RI, None, weight.tensors, weight.spec, weight.out_features)

    def merge(self, weight: Tensor) -> Tensor:
        """The rows of w_OI + s B A at their learnt lengths, in float32."""
        summed_OI = super().merge(weight)
        norm_O = summed_OI.norm(dim=1).to(self.lora_magnitude_vector.dtype)
        return summed_OI * (self.lora_magnitude_vector / norm_O).float()[:, None]


class DoRAAdapter(LoRAAdapter):
    """DoRA attached to a model; see `DoRAConfig`."""

    config: DoRAConfig

    def wrap(self, base: FrozenLinear, projection: Projection) -> DoRALinear:
        """A low-rank product beside a linear layer, and the lengths of the sum's rows."""
        module = DoRALinear(base, **self._sizes(projection))
        module.overwritten = self._overwritten is None or projection.name in self._overwritten
        return module

    @cached_property
    def _overwritten(self) -> tuple[str, ...] | None:
        """The projections whose outputs the model writes into; None where it is not understood."""
        flow = trace(self.model)
        return None if flow is None else flow.overwritten

    def wrap_experts(self, base: FrozenExperts, projection: Projection) -> Any:
        """Experts are read as weights, one at a time, which has no place for a factor on their output."""
        return WeightAdapter.wrap_experts(self, base, projection)  # type: ignore[arg-type]

    def wrap_embedding(self, base: nn.Embedding, projection: Projection) -> Any:
        """Row norms of a table would be those of tokens."""
        return WeightAdapter.wrap_embedding(self, base, projection)

    def file_keys(self) -> dict[str, nn.Parameter]:
        """LoRA's, and the magnitudes."""
        magnitudes = {
            f"{peft_format.PREFIX}{name}.lora_magnitude_vector": module.lora_magnitude_vector
            for name, module in self.adapted.items()
            if isinstance(module, DoRALinear)
        }
        return super().file_keys() | magnitudes

    def file_config(self) -> dict[str, Any]:
        """LoRA's, with PEFT's switch."""
        return super().file_config() | {"use_dora": True}


@ADAPTERS.register(DoRAConfig)
def build(config: DoRAConfig, model: nn.Module) -> DoRAAdapter:
    """Attach DoRA to a model, as LoRA is."""
    adapter = build_lora(config, model, DoRAAdapter)
    assert isinstance(adapter, DoRAAdapter)
    return adapter

"""LoRA on the weight of a module that is no linear layer, such as a router that is written out in its own code.

The module computes as it always does, with W + s B A in the place of its weight, as PEFT's `ParamWrapper` has it. It is
not among `adapter.targets`; PEFT's `all-linear` takes routers along, and such a file is loaded with them.

Shape suffixes: O out features, I in features, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters import peft_format
from finetune.adapters.adapted import FoldedWeight
from finetune.adapters.lora_layers import Factor
from finetune.adapters.mounting import SeenThrough
from finetune.adapters.peft_lora import Saved
from finetune.structure.inspect import projection_of


class LoRAParameter(SeenThrough, FoldedWeight):
    """A module whose weight W_OI has a low-rank product beside it.

    Attributes:
        lora_A, lora_B: weights A_RI and B_OR.
        scaling: factor on the product.
    """

    base: Any

    def __init__(self, base: nn.Module, *, rank: int, scaling: float) -> None:
        nn.Module.__init__(self)
        self.base, self.enabled, self.scaling = base, True, scaling
        self.out_features, self.in_features = base.weight.shape  # type: ignore[union-attr,misc]
        self.lora_A, self.lora_B = Factor(rank, self.in_features), Factor(self.out_features, rank)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with the sum for its weight, in the dtype of the weight; its own while disabled."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        weight_OI: Tensor = self.base.weight
        delta_OI = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return torch.func.functional_call(self.base, {"weight": weight_OI + delta_OI.to(weight_OI.dtype)}, args, kwargs)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The stored weight."""
        weight_OI: Tensor = self.base.weight.detach()
        return weight_OI.to(dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """w_OI + s B A, in float32."""
        return weight + self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())


def parameters_of(saved: Saved, model: nn.Module) -> list[str]:
    """Names of the modules of whose weight `target_parameters` speaks; stacked experts and linear layers are not."""
    found = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        wanted = (
            weight is not None and weight.dim() == 2 and peft_format.ends(f"{name}.weight", saved.target_parameters)
        )
        if wanted and projection_of(module, name) is None and not isinstance(module, nn.Embedding):
            found.append(name)
    return found

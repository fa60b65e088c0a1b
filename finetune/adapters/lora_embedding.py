"""LoRA beside the token embedding: row i of the table W gets s B A[:, i].

Hu et al. 2021 (arXiv:2106.09685) on a lookup, as in the authors' loralib: the columns of A are looked up, B follows.
A starts as zeros and B is normal (loralib `Embedding.reset_parameters`), so that the adapted model starts as the base.

Shape suffixes: B leading dimensions, V vocabulary, H hidden features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters.adapted import FoldedWeight
from finetune.adapters.mounting import SeenThrough
from finetune.errors import ConfigError

PROBES = 8
"""Tokens over which an embedding is compared with a lookup."""


class LoRAEmbedding(SeenThrough, FoldedWeight):
    """A token embedding with a low-rank table beside it.

    Some embeddings multiply what they look up by a number of their own (Gemma, XGLM, ...). The low-rank part is
    multiplied alike, so that merging into the table gives the same: the number is found by looking up ones.

    Attributes:
        lora_embedding_A: A_RV, named as in PEFT.
        lora_embedding_B: B_HR.
        scaling: factor on the product.
        dropout: share of what is looked up in A that is zeroed while training.
    """

    base: nn.Embedding  # type: ignore[assignment]

    def __init__(self, base: nn.Embedding, *, rank: int, scaling: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.base, self.enabled = base, True  # type: ignore[assignment]
        self.scaling, self.dropout = scaling, dropout
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.empty(base.embedding_dim, rank).normal_())
        self._factors: dict[torch.dtype, float] = {}

    def forward(self, ids_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The looked-up rows [B, H], in the dtype of the table; the base's own while disabled."""
        rows_BH: Tensor = self.base(ids_B, *args, **kwargs)
        if not self.enabled:
            return rows_BH
        a_BR = F.embedding(ids_B, self.lora_embedding_A.T, padding_idx=self.base.padding_idx)
        a_BR = F.dropout(a_BR, self.dropout, self.training).to(rows_BH.dtype)
        factor = self.scaling * self.factor(rows_BH.dtype)
        return rows_BH + F.linear(a_BR, self.lora_embedding_B.to(rows_BH.dtype)) * factor

    def factor(self, dtype: torch.dtype) -> float:
        """What the embedding multiplies a looked-up row by; it may be rounded to the dtype of the table."""
        if dtype not in self._factors:
            self._factors[dtype] = looked_up_ones(self.base)
        return self._factors[dtype]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The table of the base as a weight, w_HV."""
        return self.base.weight.detach().T.to(dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """w_HV + s B A, in float32."""
        return weight + self.scaling * (self.lora_embedding_B.float() @ self.lora_embedding_A.float())


def check_lookup(base: nn.Module, name: str) -> None:
    """Refuse an embedding that no low-rank table can stand beside.

    Raises:
        ConfigError: naming it.
    """
    if not (isinstance(base, nn.Embedding) and is_scaled_lookup(base)):
        raise ConfigError(
            f"adapter.targets names {name}, which is more than a lookup times a number, so it has no low-rank form:"
            f" leave it out, or train it whole by adapter.train_also=[{name.rpartition('.')[2]}]"
        )


@torch.no_grad()
def looked_up_ones(base: nn.Embedding) -> float:
    """What an embedding gives for a row of ones."""
    if base.weight.is_meta:
        return 1.0
    ones_VH = base.weight.new_ones(1, 1).expand_as(base.weight)
    return float(_look_up(base, ones_VH, 1)[0, 0])


@torch.no_grad()
def is_scaled_lookup(base: nn.Embedding) -> bool:
    """Whether an embedding gives the rows of its table times one number; True where there are no values to try."""
    if base.max_norm is not None:
        return False
    if base.weight.is_meta:
        return True
    count = min(PROBES, base.num_embeddings)
    found_NH, rows_NH = _look_up(base, base.weight, count), base.weight[:count]
    if found_NH.shape != rows_NH.shape:
        return False
    wanted_NH = rows_NH.float() * looked_up_ones(base)
    tolerance = 8 * torch.finfo(base.weight.dtype).eps
    return torch.allclose(found_NH.float(), wanted_NH, rtol=tolerance, atol=tolerance * float(wanted_NH.abs().max()))


def _look_up(base: nn.Embedding, weight_VH: Tensor, count: int) -> Tensor:
    """The first rows of a table as the embedding gives them, without touching its own."""
    ids_N = torch.arange(count, device=weight_VH.device)
    found: Tensor = torch.func.functional_call(base, {"weight": weight_VH}, (ids_N,))
    return found

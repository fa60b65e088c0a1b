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
from finetune.adapters.lookup import AdaptedLookup, is_scaled_lookup
from finetune.errors import ConfigError


class LoRAEmbedding(AdaptedLookup, FoldedWeight):
    """A token embedding with a low-rank table beside it.

    Where the embedding multiplies what it looks up, the low-rank part is multiplied alike, so that merging into the
    table gives the same.

    Attributes:
        lora_embedding_A: A_RV, named as in PEFT.
        lora_embedding_B: B_HR.
        scaling: factor on the product.
        dropout: share of what is looked up in A that is zeroed while training.
    """

    def __init__(self, base: nn.Embedding, *, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base)
        self.scaling, self.dropout = scaling, dropout
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.empty(base.embedding_dim, rank).normal_())

    def forward(self, ids_B: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The looked-up rows [B, H], in the dtype of the table; the base's own while disabled."""
        rows_BH: Tensor = self.base(ids_B, *args, **kwargs)
        if not self.enabled:
            return rows_BH
        a_BR = F.embedding(ids_B, self.lora_embedding_A.T, padding_idx=self.base.padding_idx)
        a_BR = F.dropout(a_BR, self.dropout, self.training).to(rows_BH.dtype)
        factor = self.scaling * self.factor(rows_BH.dtype)
        return rows_BH + F.linear(a_BR, self.lora_embedding_B.to(rows_BH.dtype)) * factor

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
    if not is_scaled_lookup(base):
        raise ConfigError(
            f"adapter.targets names {name}, which is more than a lookup times a number, so it has no low-rank form:"
            f" leave it out, or train it whole by adapter.train_also=[{name.rpartition('.')[2]}]"
        )

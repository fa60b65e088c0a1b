"""Token embeddings as adapters meet them: a table that is looked up, and what is looked up may be multiplied.

Some families multiply what they look up by a number of their own (Gemma, XGLM, ...), which is found by looking up ones.

Shape suffixes: V vocabulary, H hidden features, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune.adapters.adapted import AdaptedWeight
from finetune.adapters.mounting import SeenThrough, ground

PROBES = 8
"""Tokens over which an embedding is compared with a lookup."""


class AdaptedLookup(SeenThrough, AdaptedWeight):
    """A token embedding and what trains beside it.

    Args:
        base: gives the rows of its table times one number; see `is_scaled_lookup`.
    """

    base: nn.Embedding  # type: ignore[assignment]

    def __init__(self, base: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.base, self.enabled = base, True  # type: ignore[assignment]
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim
        self._factors: dict[torch.dtype, float] = {}

    def factor(self, dtype: torch.dtype) -> float:
        """What the embedding multiplies a looked-up row by; it may be rounded to the dtype of the table."""
        if dtype not in self._factors:
            base = ground(self.base)
            assert isinstance(base, nn.Embedding)
            self._factors[dtype] = looked_up_ones(base)
        return self._factors[dtype]


@torch.no_grad()
def looked_up_ones(base: nn.Embedding) -> float:
    """What an embedding gives for a row of ones."""
    if base.weight.is_meta:
        return 1.0
    ones_VH = base.weight.new_ones(1, 1).expand_as(base.weight)
    return float(_look_up(base, ones_VH, 1)[0, 0])


@torch.no_grad()
def is_scaled_lookup(base: nn.Module) -> bool:
    """Whether a module gives the rows of its table times one number; True where there are no values to try."""
    if not isinstance(base, nn.Embedding) or base.max_norm is not None:
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

"""Projections that `inspect` leaves out, so that a name may mean them: token embedding, output head, others.

Positions, segments and whatever else is looked up beside the tokens are no part of the embedding.
"""

from __future__ import annotations

from torch import nn

from finetune.structure.base import Projection, Structure
from finetune.structure.inspect import projection_of


def embedding_projection(model: nn.Module, structure: Structure) -> Projection | None:
    """The token embedding, one-hot tokens times a stored weight; None where it is no `nn.Embedding`.

    `in_features` is the vocabulary; memory holds [I, O].
    """
    module = model.get_submodule(structure.embeddings) if structure.embeddings else None
    if structure.embeddings is None or not isinstance(module, nn.Embedding):
        return None
    return Projection(structure.embeddings, "embedding", module.num_embeddings, module.embedding_dim, transposed=True)


def head_projection(model: nn.Module, structure: Structure) -> Projection | None:
    """The output head; None where it is no linear layer."""
    found = projection_of(model.get_submodule(structure.head), structure.head) if structure.head else None
    return found if found is not None and found.kind == "linear" else None


def other_projections(model: nn.Module, structure: Structure) -> list[Projection]:
    """Linear layers that are neither in the structure nor its head: poolers, transforms before it, scoring gates."""
    known = {structure.head, *(p.name for p in structure.projections)}
    found = (projection_of(module, name) for name, module in model.named_modules() if name not in known)
    return [p for p in found if p is not None]

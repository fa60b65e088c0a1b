"""Projections outside the blocks, so that a pattern may name them: the token embedding and the output head.

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

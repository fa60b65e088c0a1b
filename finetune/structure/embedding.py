"""The token embedding as a projection: one-hot tokens times a stored weight.

Positions, segments and whatever else is looked up beside the tokens are no part of it.
"""

from __future__ import annotations

from torch import nn

from finetune.structure.base import Projection, Structure


def embedding_projection(model: nn.Module, structure: Structure) -> Projection | None:
    """The token embedding, so that a pattern may name it; None where it is no `nn.Embedding`.

    `in_features` is the vocabulary; memory holds [I, O].
    """
    module = model.get_submodule(structure.embeddings) if structure.embeddings else None
    if structure.embeddings is None or not isinstance(module, nn.Embedding):
        return None
    return Projection(structure.embeddings, "embedding", module.num_embeddings, module.embedding_dim, transposed=True)

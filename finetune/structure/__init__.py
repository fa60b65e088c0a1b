"""What a transformers model is made of, found by type and shape."""

from finetune.structure.base import Projection, Stack, Structure
from finetune.structure.inspect import inspect
from finetune.structure.outside import embedding_projection, head_projection, other_projections

__all__ = [
    "Projection",
    "Stack",
    "Structure",
    "embedding_projection",
    "head_projection",
    "inspect",
    "other_projections",
]

"""What a transformers model is made of, found by type and shape."""

from finetune.structure.base import Projection, Stack, Structure
from finetune.structure.embedding import embedding_projection
from finetune.structure.inspect import inspect

__all__ = ["Projection", "Stack", "Structure", "embedding_projection", "inspect"]

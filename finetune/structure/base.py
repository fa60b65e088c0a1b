"""The vocabulary in which the other rooms speak of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Projection:
    """One weight that multiplies hidden states.

    Attributes:
        name: dotted path of the module ("linear", "conv1d", "embedding") or of the 3-D parameter ("experts").
        kind: how the model holds it.
        in_features, out_features: of the map x -> y, whatever the layout in memory.
        experts: how many matrices are stacked; 1 for a plain one.
        transposed: True where memory holds [.., I, O] instead of [.., O, I] (Conv1D, some experts, the embedding).
        block: index of the block it lives in; None outside the blocks (the head, the embedding).
        dense: True where the model wants this weight in floating point whatever the storage format: its own code looks
            at the weight's dtype (feed-forward outputs of T5), so codes in its place would be misread.
    """

    name: str
    kind: Literal["linear", "conv1d", "experts", "embedding"]
    in_features: int
    out_features: int
    experts: int = 1
    transposed: bool = False
    block: int | None = None
    dense: bool = False

    @property
    def leaf(self) -> str:
        """The last part of the name, e.g. `q_proj`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Stack:
    """Blocks behind one another and the module that feeds them: a decoder, an encoder, or one half of a pair of both.

    Attributes:
        name: dotted path of the module that takes `input_ids` or `inputs_embeds` with an `attention_mask` and gives the
            last hidden states; empty where that is the model itself.
        blocks: dotted names of its blocks, in order.
        causal: whether a position sees only itself and what precedes it.
        reads: whether it also attends over the output of the stack before it.
        embeddings: dotted name of the module by which it turns tokens into hidden states; None where that is unknown.
    """

    name: str
    blocks: tuple[str, ...]
    causal: bool
    reads: bool = False
    embeddings: str | None = None


@dataclass(frozen=True)
class Structure:
    """What `inspect(model)` found.

    Attributes:
        blocks: dotted names of the repeated transformer blocks, in order, those of an encoder before those of its
            decoder.
        projections: every projection inside the blocks, in module order; the head and the embeddings are not in it.
        head: dotted name of the output head, None where the model has none.
        embeddings: dotted name of the input token embedding, that of the encoder where there are two stacks.
        tied: True where the head shares its weight with the embeddings.
        ties: dotted names of all modules that share the weight of the embeddings, these included, in module order; none
            where they share it with nobody. More than a pair where stacks have an embedding each (T5, BART).
        stacks: one for most models; an encoder and a decoder where the model has both.
        task_head: dotted names of the modules behind the last stack of a model that gives no tokens (a classifier):
            made new for the task, they train beside every adapter.
    """

    blocks: tuple[str, ...]
    projections: tuple[Projection, ...]
    head: str | None
    embeddings: str | None
    tied: bool
    ties: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    task_head: tuple[str, ...] = ()

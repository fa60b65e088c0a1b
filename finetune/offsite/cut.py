"""Which blocks an emulator has, what they are called in either model, and proof that the cut is one.

Xiao, Lin and Han 2023 (arXiv:2302.04870) section 3.3: of the middle's n blocks, k stay, uniformly spread, the first and
the last among them.

Shape suffixes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError, ModelError
from finetune.model.config import ModelConfig
from finetune.model.load import skeleton
from finetune.offsite.config import OffsiteConfig
from finetune.structure import Structure, inspect
from finetune.structure.depth import cut_config

PROBE_TOKENS = 24


@dataclass(frozen=True)
class Cut:
    """An emulator's blocks.

    Attributes:
        layers: how many train at either end.
        blocks: the full model's block that each of the emulator's is, by number.
        full_names, names: dotted names of the blocks, in the full model and in the emulator.
        config: the emulator's configuration, of transformers.
    """

    layers: tuple[int, int]
    blocks: tuple[int, ...]
    full_names: tuple[str, ...]
    names: tuple[str, ...]
    config: Any

    @property
    def middle(self) -> list[int]:
        """The emulator's own numbers of its middle blocks."""
        return list(range(self.layers[0], len(self.blocks) - self.layers[1]))

    @property
    def kept(self) -> tuple[int, ...]:
        """The full model's numbers of them."""
        return tuple(self.blocks[number] for number in self.middle)

    @property
    def dropped(self) -> list[int]:
        """The full model's blocks that the emulator lacks."""
        return [number for number in range(len(self.full_names)) if number not in self.blocks]

    def full_middle(self) -> tuple[str, ...]:
        """Names of all middle blocks of the full model, kept or not."""
        return self.full_names[self.layers[0] : len(self.full_names) - self.layers[1]]

    def in_full(self, name: str) -> str:
        """What the full model calls a weight of the emulator."""
        return renamed(name, self.names, [self.full_names[number] for number in self.blocks])


def renamed(name: str, blocks: Sequence[str], others: Sequence[str]) -> str:
    """A dotted name with the block that it lies in exchanged for the one in the same place of another list."""
    for block, other in zip(blocks, others, strict=True):
        if name.startswith(f"{block}."):
            return f"{other}{name.removeprefix(block)}"
    return name


def spread(middle: int, keep: int) -> list[int]:
    """Which of so many blocks stay: index round(i (n - 1) / (k - 1)), the first and the last among them."""
    return [0] if keep == 1 else [round(i * (middle - 1) / (keep - 1)) for i in range(keep)]


def plan(model: ModelConfig, offsite: OffsiteConfig) -> Cut:
    """Decide the cut from the model's configuration alone, before any weight is read.

    Raises:
        ConfigError: for more blocks than there are, and models that are not cut this way.
        ModelError: where the model cannot be built with fewer blocks.
    """
    from finetune.model.pretrained import empty_model

    full = skeleton(model)
    structure = inspect(full)
    check_decoder(full, structure)
    count, (first, last) = len(structure.blocks), offsite.layers
    middle = count - first - last
    if middle < 1:
        raise ConfigError(
            f"offsite.layers is [{first},{last}], but the model has {count} blocks: expected at most {count - 1}"
            " together, so that a middle is left"
        )
    keep = offsite.keep if isinstance(offsite.keep, int) else max(1, round(offsite.keep * middle))
    if keep > middle:
        raise ConfigError(f"offsite.keep is {keep}, but the middle has {middle} blocks: expected at most {middle}")
    kept = [first + number for number in spread(middle, keep)]
    blocks = (*range(first), *kept, *range(count - last, count))
    owner = structure.blocks[0].rpartition(".")[0]
    names = tuple(f"{owner}.{number}" for number in range(len(blocks)))
    config = cut_config(full, blocks, lambda cut: empty_model(cut, model))
    return Cut((first, last), blocks, structure.blocks, names, config)


def check_decoder(model: nn.Module, structure: Structure) -> None:
    """Refuse what is no decoder-only language model.

    Raises:
        ConfigError: naming the model's class.
    """
    if len(structure.stacks) != 1 or not structure.stacks[0].causal or structure.head is None:
        raise ConfigError(
            f"{type(model).__name__} cannot be cut in three: expected a language model that is one stack of blocks,"
            " each seeing what is before it"
        )


@contextmanager
def without(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Within it some blocks hand on what they are given."""

    def skip(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    with ExitStack() as stack:
        for name in blocks:
            stack.callback(model.get_submodule(name).register_forward_hook(skip, with_kwargs=True).remove)
        yield


@torch.no_grad()
def prove(full: nn.Module, emulator: nn.Module, cut: Cut) -> None:
    """Compare the emulator, as it was read back, with the full model whose dropped blocks hand on what they are given.

    Raises:
        ModelError: unless the logits are equal bit for bit; then a block depends on its place.
    """
    embeddings: Any = full.get_input_embeddings()  # type: ignore[operator]
    weight = embeddings.weight
    ids_BS = (torch.arange(2 * PROBE_TOKENS, device=weight.device) * 7919 % weight.shape[0]).view(2, PROBE_TOKENS)
    with without(full, [cut.full_names[number] for number in cut.dropped]):
        wanted = full(input_ids=ids_BS, use_cache=False).logits
    found = emulator(input_ids=ids_BS, use_cache=False).logits
    if not torch.equal(found, wanted):
        raise ModelError(
            f"{type(full).__name__} cannot be cut: without blocks {cut.dropped} it does not compute what its other"
            f" blocks do (logits off by {float((found - wanted).abs().max()):.2g}); its blocks depend on their place"
        )

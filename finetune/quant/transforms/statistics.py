"""What the channels of a scaled tensor look like over all calibration batches.

Shape suffixes: N samples, I channels, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from finetune.quant.dense import DenseExperts
from finetune.quant.gram import Gram
from finetune.quant.replay import watching
from finetune.quant.transforms.base import Forward
from finetune.quant.transforms.probe import before_call
from finetune.quant.transforms.search import Scaling
from finetune.structure.base import Projection


class Channels:
    """Figures of one tensor, in float32.

    Attributes:
        samples: how many inputs were seen.
        total_I: sum of magnitudes.
        largest_I: largest magnitude.
        gram: sum of x x^T, where it is asked for.
    """

    def __init__(self, gram: bool) -> None:
        self.samples = 0
        self.total_I: Tensor | None = None
        self.largest_I: Tensor | None = None
        self.gram = Gram() if gram else None

    def add(self, x: Tensor) -> None:
        """Take some inputs in, [.., I]."""
        size_NI = x.detach().reshape(-1, x.shape[-1]).float().abs()
        if not len(size_NI):
            return
        self.samples += len(size_NI)
        total_I, largest_I = size_NI.sum(0), size_NI.amax(0)
        self.total_I = total_I if self.total_I is None else self.total_I + total_I
        self.largest_I = largest_I if self.largest_I is None else torch.maximum(self.largest_I, largest_I)
        if self.gram is not None:
            self.gram.add(x)


@dataclass
class Statistics:
    """Figures of what the readers of a tensor were given.

    Attributes:
        plain: of the tensor as projections and routers read it; None where only experts do.
        experts: by the name of a stack, of the rows that each of its experts was given; None for one that saw none.
    """

    plain: Channels | None = None
    experts: dict[str, list[Channels | None]] = field(default_factory=dict)

    def mean(self) -> Tensor | None:
        """The mean magnitude of each channel, [I]; None where nothing was seen."""
        parts = [self.plain] if self.plain is not None else [c for stack in self.experts.values() for c in stack]
        seen = [c for c in parts if c is not None and c.total_I is not None]
        if not seen:
            return None
        return torch.stack([c.total_I for c in seen if c.total_I is not None]).sum(0) / sum(c.samples for c in seen)

    def largest(self) -> Tensor | None:
        """The largest magnitude of each channel, [I]; None where nothing was seen."""
        parts = [self.plain, *(c for stack in self.experts.values() for c in stack)]
        found = [c.largest_I for c in parts if c is not None and c.largest_I is not None]
        return torch.stack(found).amax(0) if found else None


def gather(
    model: nn.Module, scaling: Scaling, projections: Mapping[str, Projection], forward: Forward, *, grams: bool
) -> Statistics:
    """Run the block over all batches and look at what the readers of a tensor are given.

    Args:
        projections: of the block, by name.
        grams: whether second moments are wanted.
    """
    stacks = [name for name in scaling.readers if isinstance(model.get_submodule(name), DenseExperts)]
    plain = [name for name in scaling.readers if name not in stacks]
    plain.sort(key=lambda name: name not in projections)  # a router reads it as well, where there is nothing else
    found = Statistics()
    found.experts = {name: [None] * projections[name].experts for name in stacks}

    def saw(name: str, expert: int, x: Tensor) -> None:
        channels = found.experts[name][expert] or Channels(grams)
        channels.add(x)
        found.experts[name][expert] = channels

    with ExitStack() as stack, torch.no_grad():
        if plain:
            found.plain = Channels(grams and plain[0] in projections)
            stack.enter_context(before_call(model.get_submodule(plain[0]), found.plain.add))
        stack.enter_context(watching(model, [projections[name] for name in stacks], saw))
        for _ in forward():
            pass
    return found

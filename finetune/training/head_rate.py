"""How fast a head learns that was made for the task.

It starts as small random weights over features whose size is the base's affair: about 0.1 behind a pooler that is new
as well, 1.4 behind a decoder's last norm. Adam moves every weight by about the learning rate, so one step can move an
output by rate * inputs * size of an input. `train.head_step` says how far that is to be, and the rates follow from what
the head is given at the start. Where the head is slow, what is adapted before it moves by noise until it is worth
nothing to any head; where it is fast, it follows each batch and forgets the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from finetune.adapters.base import Learner
from finetune.data.rows import Batch
from finetune.structure.experiments import in_mode
from finetune.training.config import TrainConfig


@torch.no_grad()
def head_scales(config: TrainConfig, adapter: Learner, batch: Batch) -> dict[str, float]:
    """Factors on the peak for a head's projections, by names of what trains; empty without such a head.

    Args:
        config: with its `learning_rate` set.
        batch: some rows of the run.
    """
    assert config.learning_rate is not None
    layers = dict(_projections(adapter))
    if not layers or config.head_step is None:
        return {}
    reach: dict[str, float] = {}

    def note(name: str, x: Tensor) -> None:
        reach[name] = x.shape[-1] * float(x.detach().float().square().mean().sqrt())

    with ExitStack() as stack, in_mode(adapter.model, training=False):
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            stack.callback(handle.remove)
        adapter.model(**batch.model_inputs())
    rates = {name: config.head_step / far for name, far in reach.items() if far > 0}
    return {
        f"{name}.{leaf}": rate / config.learning_rate
        for name, rate in rates.items()
        for leaf, _ in layers[name].named_parameters()
    }


def _projections(adapter: Learner) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that train in the head, by their names in the model."""
    for module in adapter.task_head:
        whole = f"{module}.trained"
        for name, layer in adapter.model.get_submodule(whole).named_modules(prefix=whole):
            if isinstance(layer, nn.Linear):
                yield name, layer

"""Whether a small block computes what the large one does without the parts that go.

Shape suffixes: E experts, I columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from finetune.quant.dense import DenseExperts, DenseLinear
from finetune.quant.pruners.cut import Run
from finetune.quant.replay import watching
from finetune.structure.base import Projection

SLACK = 8
"""Units in the last place of the largest value that the two may differ by; no less than `LEAST` of that value."""
LEAST = 1e-5
Seen = dict[tuple[str, int], list[Tensor]]


@torch.no_grad()
def differs(
    name: str,
    block: nn.Module,
    small: nn.Module,
    readers: Sequence[Projection],
    columns: Mapping[str, Tensor],
    run: Run,
) -> str:
    """Where and by how much the small block is off, on the first batch; empty where it is not.

    Its readers have to be given the same columns, and it has to put out what the large block does where the others are
    zero. The first tells more: what a reader makes little of, and what the residual hides.

    Args:
        name: of the block.
        readers: of parts that go.
        columns: by the names of readers, those that stay, [E, I].
    """
    inside = [replace(p, name=p.name.removeprefix(f"{name}.")) for p in readers]
    kept = {p.name: columns[f"{name}.{p.name}"] for p in inside}
    with ExitStack() as stack:
        for p in inside:
            stack.enter_context(_others_zero(block.get_submodule(p.name), kept[p.name]))
        wanted, output = _seen(block, inside, run)
    found, small_output = _seen(small, inside, run)
    for (reader, expert), given in wanted.items():
        index = kept[reader][expert].to(given[0].device)
        why = _off(torch.cat([x[:, index] for x in given]), torch.cat(found.get((reader, expert), given)))
        if why:
            return f"what {reader} reads {why}"
    why = _off(output, small_output)
    return f"what it puts out {why}" if why else ""


def _off(wanted: Tensor, found: Tensor) -> str:
    """By how much a tensor is off, in words; empty where it is not."""
    if wanted.shape != found.shape:
        return f"has shape {list(found.shape)}, not {list(wanted.shape)}"
    slack = max(LEAST, SLACK * torch.finfo(wanted.dtype).eps) * float(wanted.abs().max())
    off = float((wanted - found).abs().max())
    return "" if off <= slack else f"is off by {off:.2g}"


@contextmanager
def _others_zero(module: nn.Module, columns: Tensor) -> Iterator[None]:
    """Within it, only some columns of each matrix of a dense frozen module are other than zero."""
    assert isinstance(module, DenseLinear | DenseExperts)
    held = module.weight.detach()
    mask = torch.zeros(len(columns), module.in_features, dtype=torch.bool, device=held.device)
    mask.scatter_(1, columns.to(held.device), True)
    mask = mask.unsqueeze(-1 if module.transposed else -2)
    module.hold(held * (mask if held.dim() == 3 else mask[0]))
    try:
        yield
    finally:
        module.hold(held)


def _seen(block: nn.Module, readers: Sequence[Projection], run: Run) -> tuple[Seen, Tensor]:
    """What each matrix of the readers reads, and what the block puts out, for the first batch."""
    found: Seen = {}

    def saw(name: str, expert: int, x: Tensor) -> None:
        found.setdefault((name, expert), []).append(x.flatten(0, -2))

    with watching(block, readers, saw):
        output = next(run(block))
    return found, output

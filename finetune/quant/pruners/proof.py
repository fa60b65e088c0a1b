"""Whether a small block computes what the large one does without the parts that go.

Shape suffixes: E experts, K units that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.quant.dense import DenseExperts, DenseLinear
from finetune.quant.pruners.cut import Run
from finetune.structure.base import Projection

SLACK = 8
"""Units in the last place of the largest value that the two may differ by; no less than `LEAST` of that value."""
LEAST = 1e-5


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

    What the readers put out is compared, and what the block does, in which the residual would hide much.

    Args:
        name: of the block.
        readers: of parts that go.
        columns: by the names of readers, those that stay, [E, ..]; the others of the large block count as zero.
    """
    paths = [p.name.removeprefix(f"{name}.") for p in readers]
    with ExitStack() as stack:
        for p, path in zip(readers, paths, strict=True):
            stack.enter_context(_others_zero(block.get_submodule(path), columns[p.name]))
        wanted = _outputs(block, paths, run)
    found = _outputs(small, paths, run)
    for path in wanted:
        before, after = wanted[path], found[path]
        if before.shape != after.shape:
            return f"{path or 'its output'} has shape {list(after.shape)}, not {list(before.shape)}"
        slack = max(LEAST, SLACK * torch.finfo(before.dtype).eps) * float(before.abs().max())
        off = float((before - after).abs().max())
        if not off <= slack:
            return f"{path or 'its output'} is off by {off:.2g}"
    return ""


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


def _outputs(block: nn.Module, readers: Sequence[str], run: Run) -> dict[str, Tensor]:
    """What the readers, or the modules that their stacks are in, put out for the first batch; under "" the block."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack:
        for path in readers:
            stacked = isinstance(block.get_submodule(path), DenseExperts)
            module = block.get_submodule(path.rpartition(".")[0] if stacked else path)
            stack.callback(module.register_forward_hook(keep(path)).remove)
        found[""] = next(run(block))
    return found

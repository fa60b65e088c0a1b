"""The processes of a run, seen by one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finetune.errors import RunError


class Group:
    """Sums, broadcasts and shared fate over the processes of an `accelerate.Accelerator`.

    Attributes:
        world, rank: how many there are, and which this one is.
        main: whether this is the one that prints, tracks and saves.
        device: this process's.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.world, self.rank = int(accelerator.num_processes), int(accelerator.process_index)
        self.main = bool(accelerator.is_main_process)
        self.device = torch.device(accelerator.device)

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sum over the processes, in float64."""
        if self.world == 1:
            return values
        total = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum")
        summed: list[float] = total.tolist()
        return summed

    def concatenate(self, values: list[float]) -> list[float]:
        """The values of all processes behind one another, in float64; each may have another number of them."""
        if self.world == 1:
            return values
        counts = self.sum([float(len(values)) if rank == self.rank else 0.0 for rank in range(self.world)])
        starts = [int(sum(counts[:rank])) for rank in range(self.world + 1)]
        mine = [0.0] * starts[self.rank] + values + [0.0] * (starts[-1] - starts[self.rank + 1])
        return self.sum(mine)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients over the processes, in float32 and in place; a missing one counts as zero."""
        if self.world == 1:
            return
        held = list(parameters)
        for parameter in held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.float().flatten() for parameter in held if parameter.grad is not None])
        flat = self.accelerator.reduce(flat, "sum")
        for parameter, part in zip(held, flat.split([p.numel() for p in held]), strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(part.view_as(parameter.grad))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process rank 0's values, in place."""
        if self.world == 1:
            return
        from accelerate.utils import broadcast

        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.detach().clone()))

    def gather(self, tensor: Tensor) -> Tensor:
        """[world, ...] of a tensor that has the same shape everywhere."""
        if self.world == 1:
            return tensor[None]
        gathered: Tensor = self.accelerator.gather(tensor[None].to(self.device))
        return gathered

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work without collectives in it: where it fails on one process, it fails on all.

        Raises:
            RunError: where another process failed; the one that did raises its own error.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        failed = self.sum([float(error is not None)])[0]
        if error is not None:
            raise error
        if failed:
            raise RunError("another process of this run failed: its own message says why")

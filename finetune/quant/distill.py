"""Layer-by-layer distillation of ZeroQuant (Yao et al. 2022, arXiv:2206.01861, section 4.2), over any storage format.

Once a block is quantized, its weights, norms and biases are trained to give, from the hidden states that the quantized
blocks before it put out, what the dense block gives in the dense model: so it makes good what those before it lost. In
the paper the target is what the dense block makes of the same hidden states (`targets`: same). No labels, one block in
memory, mean squared error, Adam.

A weight is trained behind its codes. In each step the codes are those nearest to it on the grid that its rounder
fitted, and the block is run as it is stored, integer products and rounded inputs included; the gradient of the stored
weight is taken for that of the one behind it (straight-through). So what is kept at the end is what was measured.

Shape suffixes: E experts, O out features, I in features, B leading dimensions, N samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.quant.base import FrozenWeight
from finetune.quant.dense import DenseExperts
from finetune.quant.grid import Grid
from finetune.quant.packed import PackedExperts, PackedWeight
from finetune.quant.rounders.zeros import MaskedGrid

Forward = Callable[[], Iterator[Tensor]]
"""Runs a block over all calibration batches, one a step."""
Told = Callable[[str, int, int], None]
"""`told(what, step, of)`: how far a block is, in words."""


@dataclass
class DistillConfig:
    """How the blocks are trained.

    Attributes:
        steps: of Adam for each block; 0 trains nothing.
        learning_rate: at first, in units of the root mean square of each tensor; it falls to 0 along a line.
        targets: dense | same: what the dense block puts out in the dense model, or of the inputs of the quantized one.
        batch_tokens: of a step, at most, unless one piece is longer.
    """

    steps: int = 0
    learning_rate: float = 0.01
    targets: str = "dense"
    batch_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"distill.steps is {self.steps}: expected 0 (no distillation) or more")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"distill.learning_rate is {self.learning_rate}: expected between 0 and 1")
        if self.targets not in ("dense", "same"):
            raise ConfigError(f"distill.targets is {self.targets}: expected dense or same")
        if self.batch_tokens < 1:
            raise ConfigError(f"distill.batch_tokens is {self.batch_tokens}: expected 1 or more")


@dataclass(frozen=True)
class Distilled:
    """What training did to one block.

    Attributes:
        block: its dotted name.
        before, after: squared error of the hidden states that it puts out over their squares, on the calibration data.
    """

    block: str
    before: float
    after: float


class Distiller:
    """Trains one quantized block after the other.

    Attributes:
        told: asked after each step.
        done: what became of each block, those of an earlier run included.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.told: Told = lambda what, step, of: None
        self.done: list[Distilled] = []
        self._weights: list[tuple[str, PackedWeight, Grid, Tensor]] = []

    def take(self, name: str, module: PackedWeight, grid: Grid, weight: Tensor) -> None:
        """A weight of the block whose turn it is was quantized.

        Args:
            grid: that its codes were chosen on.
            weight: before that, in the layout of the codes.
        """
        self._weights.append((name, module, grid, weight))

    def block(self, model: nn.Module, name: str, forward: Forward, targets: Iterable[Tensor]) -> None:
        """Train a block in place; it stays as it is where that does not lessen its error.

        Args:
            name: of the block.
            forward: runs it as it is then.
            targets: what it should put out, for each batch.
        """
        weights, self._weights = self._weights, []
        parts: list[_Trained] = [_Plain(parameter) for parameter in _plain(model, name)]
        for path, module, grid, weight in weights:
            stacked = isinstance(module, PackedExperts)
            parts.append(_Stack(model, path, module, grid, weight) if stacked else _Linear(module, grid, weight))
        before = _error(forward, targets)
        if not parts:
            return
        with ExitStack() as stack, torch.enable_grad():
            for part in parts:
                stack.enter_context(part.attached())
            self._train(name, parts, forward, targets)
        after = _error(forward, targets)
        if not after < before:
            after = before
            for part in parts:
                part.restore()
        self.done.append(Distilled(name, before, after))
        self.told(f"distilled {name}: error {before:.2e} to {after:.2e}", self.config.steps, self.config.steps)

    def _train(self, block: str, parts: list[_Trained], forward: Forward, targets: Iterable[Tensor]) -> None:
        """All steps of one block."""
        scales = [float(part.behind.detach().square().mean().sqrt()) for part in parts]
        groups = [
            {"params": [part.behind], "lr": self.config.learning_rate * scale}
            for part, scale in zip(parts, scales, strict=True)
        ]
        steps = self.config.steps
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        step = 0
        while step < steps:
            for output, target in zip(forward(), targets, strict=True):
                # Summed: Adam looks at no scale, and means over many numbers are lost in half precision.
                F.mse_loss(output.float(), target.float(), reduction="sum").backward()
                for part in parts:
                    part.collect()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                with torch.no_grad():
                    for part in parts:
                        part.write()
                step += 1
                if step == steps:
                    break
                self.told(f"distilling {block}", step, steps)


class _Trained(ABC):
    """A tensor of a block that is trained.

    Attributes:
        behind: float32, what the optimizer moves.
    """

    behind: Tensor

    def attached(self) -> AbstractContextManager[object]:
        """Within it, a backward through the block reaches this."""
        return nullcontext()

    def collect(self) -> None:
        """Have the gradient at `behind`."""
        return None

    @abstractmethod
    def write(self) -> None:
        """Have the block compute with what `behind` is now."""

    @abstractmethod
    def restore(self) -> None:
        """Put the block back to what it was."""


class _Plain(_Trained):
    """A norm's factor, or a bias."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.before = parameter, parameter.detach().clone()
        self.behind = parameter.detach().float().clone().requires_grad_()

    @contextmanager
    def attached(self) -> Iterator[None]:
        self.parameter.requires_grad_(True)
        try:
            yield
        finally:
            self.parameter.requires_grad_(False)
            self.parameter.grad = None

    def collect(self) -> None:
        grad, self.parameter.grad = self.parameter.grad, None
        self.behind.grad = None if grad is None else grad.float()

    def write(self) -> None:
        self.parameter.copy_(self.behind)

    def restore(self) -> None:
        self.parameter.copy_(self.before)


class _Codes(_Trained):
    """A weight in codes; zeros that a pruner made stay."""

    def __init__(self, module: PackedWeight, grid: Grid, weight: Tensor) -> None:
        self.module, self.grid = module, grid
        self.spans = grid.grid if isinstance(grid, MaskedGrid) else grid
        self.before = [module._parameters[name] for name in module.stored]
        stored, w = module.decode(torch.float32), weight.float()
        # Where the rounder took another code than the nearest, what is behind it starts at what is stored.
        same = grid.decode(grid.round_columns(w, 0)) == stored
        self.behind = torch.where(same, w, stored).requires_grad_()

    def write(self) -> None:
        self.module.take(self.spans, self.grid.round_columns(self.behind.detach(), 0))

    def restore(self) -> None:
        self.module.hold(self.before)


class _Linear(_Codes):
    """The weight of a linear layer."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        def after(_module: nn.Module, args: tuple[Any, ...], y_BO: Tensor) -> Tensor:
            return _Straight.apply(y_BO, args[0], self.behind)

        handle = self.module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


class _Stack(_Codes):
    """A stack of experts; while it is trained the decoded weights stand in for it."""

    def __init__(self, model: nn.Module, name: str, module: PackedWeight, grid: Grid, weight: Tensor) -> None:
        super().__init__(module, grid, weight)
        assert isinstance(module, PackedExperts)
        parent, _, self.leaf = name.rpartition(".")
        self.parent, self.stack = model.get_submodule(parent), module
        _, rows, columns = module.shape
        self.dense = DenseExperts(
            rows,
            columns,
            experts=module.num_experts,
            dtype=module.dtype,
            device=weight.device,
            transposed=module.transposed,
        )

    @contextmanager
    def attached(self) -> Iterator[None]:
        self.dense.store(self.stack.dequantize(self.stack.dtype))
        self.dense.weight.requires_grad_(True)
        setattr(self.parent, self.leaf, self.dense)
        try:
            yield
        finally:
            setattr(self.parent, self.leaf, self.stack)

    def collect(self) -> None:
        grad, self.dense.weight.grad = self.dense.weight.grad, None
        self.behind.grad = None if grad is None else self.stack.codes_layout(grad).float()

    def write(self) -> None:
        super().write()
        self.dense.weight.copy_(self.stack.dequantize(self.stack.dtype))


class _Straight(torch.autograd.Function):
    """An output as it is; the gradient of its weight goes to the tensor behind the codes."""

    @staticmethod
    def forward(ctx: Any, y_BO: Tensor, x_BI: Tensor, behind_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_BI)
        return y_BO.view_as(y_BO)

    @staticmethod
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        (x_BI,) = ctx.saved_tensors
        grad_NO, x_NI = grad_BO.reshape(-1, grad_BO.shape[-1]), x_BI.reshape(-1, x_BI.shape[-1])
        return grad_BO, None, (grad_NO.T @ x_NI).float()


def _plain(model: nn.Module, block: str) -> Iterator[nn.Parameter]:
    """The vectors of a block that nothing outside of it shares: factors of norms, and biases."""
    outside = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith(f"{block}.")}
    seen: set[int] = set()
    for module in model.get_submodule(block).modules():
        for name, parameter in module.named_parameters(recurse=False):
            held = isinstance(module, FrozenWeight) and name != "bias"
            if held or parameter.dim() != 1 or not parameter.is_floating_point() or id(parameter) in outside | seen:
                continue
            seen.add(id(parameter))
            yield parameter


def _error(forward: Forward, targets: Iterable[Tensor]) -> float:
    """Squared error of what a block puts out, over the squares of what it should."""
    error = energy = 0.0
    for output, target in zip(forward(), targets, strict=True):
        error += float((output.double() - target.double()).square().sum())
        energy += float(target.double().square().sum())
    return error / energy if energy > 0 else 0.0

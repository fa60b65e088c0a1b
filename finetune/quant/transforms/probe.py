"""One block of a dense model, run on one batch with some of its tensors scaled: how a model is asked what reads what.

All factors are powers of two. So a product with them is exact in every dtype, and where a factor is undone the result
is the same bit for bit: what is left of a difference is a reader that nobody thought of.

Shape suffixes: N samples, K outputs of what gives a tensor, I inputs of what reads it, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.quant.dense import DenseExperts
from finetune.quant.replay import watching
from finetune.structure.base import Projection

SLACK = 4
"""Units in the last place of the largest value that two runs may differ by, for kernels that add in another order."""


@dataclass
class Seen:
    """What a run showed.

    Attributes:
        inputs: what each reader multiplied, [N, I], in the order of their first calls; experts behind one another.
        output: the tensors that the block returned.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    output: list[Tensor] = field(default_factory=list)


class Probe:
    """Runs one block.

    Args:
        model: whose projections are dense frozen modules.
        block: its dotted name.
        projections: of the block, all of them.
        routers: names of its other modules that multiply by a matrix of their own.
        go: runs the block once.
    """

    def __init__(
        self,
        model: nn.Module,
        block: str,
        projections: Sequence[Projection],
        routers: Sequence[str],
        go: Callable[[], object],
    ) -> None:
        self.model, self.block, self.go = model, block, go
        self.projections = {p.name: p for p in projections}
        self.routers = tuple(routers)
        self.base = self.run()

    @torch.no_grad()
    def run(self, source: str = "", by_K: Tensor | None = None, undone: Mapping[str, Tensor] | None = None) -> Seen:
        """One run.

        Args:
            source: a norm or projection whose output is multiplied by `by_K`; empty for none.
            undone: by the names of readers, factors by which their inputs are divided; what is reported as their input
                is what they were given.
        """
        seen, parts = Seen(), {}  # type: ignore[var-annotated]

        def saw(name: str, _expert: int, x: Tensor) -> None:
            parts.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).clone())

        scaled = [(name, by_I.reciprocal(), "columns") for name, by_I in (undone or {}).items()]
        scaled += [] if by_K is None else [(source, by_K, "rows")]
        # Stacks are watched by the weight that they have then; other inputs are seen before a later hook changes them.
        scaled.sort(key=lambda change: not self._is_stack(change[0]))
        stacks = sum(self._is_stack(name) for name, *_ in scaled)
        with ExitStack() as stack:
            for change in scaled[:stacks]:
                stack.enter_context(self._scaled(*change))
            stack.enter_context(_outputs(self.model.get_submodule(self.block), seen.output))
            for name in self.routers:
                stack.enter_context(before_call(self.model.get_submodule(name), partial(saw, name, 0)))
            stack.enter_context(watching(self.model, list(self.projections.values()), saw))
            for change in scaled[stacks:]:
                stack.enter_context(self._scaled(*change))
            self.go()
        seen.inputs = {name: torch.cat(tensors) for name, tensors in parts.items()}
        return seen

    def _is_stack(self, name: str) -> bool:
        return isinstance(self.model.get_submodule(name), DenseExperts)

    @contextmanager
    def _scaled(self, name: str, by: Tensor, side: str) -> Iterator[None]:
        """Within it, the output ("rows") or the input ("columns") of a module is multiplied."""
        module = self.model.get_submodule(name)
        if isinstance(module, DenseExperts):
            held = module.weight
            by = by.to(device=held.device, dtype=held.dtype)
            last = (side == "columns") != module.transposed
            module.hold(held * (by if last else by.unsqueeze(-1)))
            try:
                yield
            finally:
                module.weight = held
        elif side == "rows":
            handle = module.register_forward_hook(lambda _m, _a, out: out * by.to(out))
            try:
                yield
            finally:
                handle.remove()
        else:
            with before_call(module, lambda x: x * by.to(x)):
                yield

    def same(self, seen: Seen) -> bool:
        """Whether the block returned what it returns untouched."""
        return len(seen.output) == len(self.base.output) and all(
            alike(before, after) for before, after in zip(self.base.output, seen.output, strict=True)
        )


def alike(wanted: Tensor, found: Tensor) -> bool:
    """Whether two tensors are equal but for the order of additions."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if torch.equal(wanted, found) or not wanted.is_floating_point():
        return torch.equal(wanted, found)
    slack = SLACK * torch.finfo(wanted.dtype).eps * wanted.abs().max()
    return bool(((wanted - found).abs() <= slack).all())


@contextmanager
def before_call(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within it, `change` is told the first tensor that a module is given, and may give another."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                changed = change(value)
                return None if changed is None else ((*args[:place], changed, *args[place + 1 :]), kwargs)
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                changed = change(value)
                return None if changed is None else (args, {**kwargs, key: changed})
        return None

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _outputs(module: nn.Module, into: list[Tensor]) -> Iterator[None]:
    """Within it, collects every tensor that a module returns."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value.detach().clone()
        elif isinstance(value, list | tuple):
            for entry in value:
                yield from tensors(entry)

    handle = module.register_forward_hook(lambda _m, _a, output: into.extend(tensors(output)))
    try:
        yield
    finally:
        handle.remove()

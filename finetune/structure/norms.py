"""The norms of a model, found by what they hold."""

from __future__ import annotations

from torch import nn


def norms(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every module that norms with learnt factors, by name in module order, with the names of its parameters.

    Such a module holds one vector called `weight`, perhaps one of the same length called `bias`, no children, and a
    small positive number (its epsilon). Norms of heads, of latents and after the last block are found as well.
    """
    return {name: parts for name, module in model.named_modules() if (parts := _parts(module))}


def _parts(module: nn.Module) -> tuple[str, ...]:
    held = dict(module.named_parameters(recurse=False))
    if "weight" not in held or not held.keys() <= {"weight", "bias"} or any(True for _ in module.children()):
        return ()
    if held["weight"].dim() != 1 or len({p.shape for p in held.values()}) != 1:
        return ()
    small = any(isinstance(value, float) and 0 < value < 1e-2 for value in vars(module).values())
    return tuple(held) if small else ()

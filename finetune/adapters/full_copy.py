"""`adapter.train_also`: whole modules trained beside an adapter, such as the head and the token embedding.

The stored module stays as it is; a copy of it in float32 trains, and is cast to the stored dtype whenever it computes.
At the start that cast gives back the stored bits. PEFT calls the same thing `modules_to_save`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.mounting import Mounted
from finetune.adapters.targets import matches
from finetune.errors import ConfigError, nearest
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight
from finetune.structure import Structure

USUAL_HEADS = ("classifier", "score")
"""peft 0.21 `utils/constants.py`, `SEQ_CLS_HEAD_NAMES`, which it adds to `modules_to_save` itself."""


class FullCopy(Mounted):
    """Stands for a module, computing with a trained copy of its weights.

    What the module offers besides (`weight`, `in_features`, `padding_idx`, ...) is read through; parameters come
    in the dtype they compute in.

    Args:
        base: the frozen module; a quantized linear layer is decoded into a plain one.
        dtype: of the trained parameters.
        leaves: names of the parameters that train; None for all of them.
    """

    base: nn.Module
    trained: nn.Module

    def __init__(self, base: nn.Module, dtype: torch.dtype, leaves: Collection[str] | None = None) -> None:
        super().__init__()
        self.base, self.trained = base, dense_copy(base)
        for name, parameter in self.trained.named_parameters():
            if parameter.is_floating_point() and (leaves is None or name in leaves):
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(True)
        stored = [p.dtype for p in base.parameters() if p.is_floating_point()]
        # What is decoded computes in the dtype of its input, like the frozen layer it stands for.
        self.dtype = None if isinstance(base, FrozenWeight) or not stored else stored[0]
        # Trained beside a 16-bit model, a weight is worth what 16 bits hold of it, also where the model is widened to
        # be measured: next to one, where norms are, the rest is a good part of what they have learnt.
        self.steps = () if self.dtype is None else (self.dtype,)
        self.enabled = True

    def trains(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that train, by their name in the module."""
        return ((name, p) for name, p in self.trained.named_parameters() if p.requires_grad)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the trained weights, or the stored one while disabled."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        dtype = self.dtype or next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
        weights = {name: self._cast(p, dtype) for name, p in self.trained.named_parameters()}
        return torch.func.functional_call(self.trained, weights, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "enabled" not in self.__dict__:  # not built yet, or being copied
                raise
            value = getattr(self.trained if self.enabled else self.base, name)
            cast = self.enabled and self.dtype is not None and isinstance(value, nn.Parameter)
            return self._cast(value, self.dtype) if cast else value

    def _cast(self, parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
        for step in self.steps:
            parameter = parameter.to(step)
        return parameter.to(dtype)


def dense_copy(base: nn.Module) -> nn.Module:
    """A copy whose parameters can train: a frozen linear layer becomes a plain one in float32."""
    if isinstance(base, FrozenLinear):
        weight = base.dequantize(torch.float32)
        dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight.clone())
        if base.bias is not None:
            dense.bias = nn.Parameter(base.bias.detach().float().clone())
        return dense
    return copy.deepcopy(base)


def trained_whole(model: nn.Module, structure: Structure, names: Sequence[str]) -> list[str]:
    """Dotted names of the modules that train whole: those of `adapter.train_also`, and a head made for the task.

    Raises:
        ConfigError: as `resolve_modules`.
    """
    named = resolve_modules(model, structure, names)
    return named + [name for name in structure.task_head if name not in named]


def resolve_modules(model: nn.Module, structure: Structure, names: Sequence[str]) -> list[str]:
    """Dotted names of the modules that `adapter.train_also` means, in module order.

    Raises:
        ConfigError: for a name that matches no module, or one that is a stack of experts, a Conv1D or a container of
            projections, and where only one of two tied modules is named.
    """
    if not names:
        return []
    modules = {
        name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    }
    for pattern in names:
        if not any(matches(pattern, name) for name in modules):
            leaves = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
            raise ConfigError(
                f"adapter.train_also: {pattern!r} matches no module of the model;"
                f" have {', '.join(leaves)}{nearest(pattern.rpartition('.')[2], leaves)}"
            )
    chosen = [name for name in modules if any(matches(pattern, name) for pattern in names)]
    for name in chosen:
        inside = [p.name for p in structure.projections if p.name.startswith(f"{name}.")]
        if inside:
            raise ConfigError(
                f"adapter.train_also: {name} holds the projections {', '.join(inside[:3])};"
                f" name modules without projections, or adapt these by adapter.targets"
            )
        transposed = any(p.name == name and p.transposed for p in structure.projections)
        if isinstance(modules[name], FrozenExperts) or transposed:
            raise ConfigError(
                f"adapter.train_also: {name} is stored stacked or transposed and cannot be trained whole;"
                f" adapt it by adapter.targets"
            )
    _check_tied(structure, chosen)
    return chosen


def saved_whole(model: nn.Module, structure: Structure, names: Sequence[str]) -> list[str]:
    """Dotted names of the modules that `modules_to_save` of a PEFT file means.

    To PEFT, any module means whatever ends in its letters, so that `norm` is every `input_layernorm` as well
    (`utils/other.py`, `_set_trainable`); and it notes the usual names of heads with every classifier, whatever the head
    at hand is called.

    Raises:
        ConfigError: as `resolve_modules`.
    """
    there = [name for name, module in model.named_modules() if any(True for _ in module.parameters())]
    found = {n: [n] if n in there else [name for name in there if name.endswith(n)] for n in names}
    return resolve_modules(
        model, structure, [full for n in names if found[n] or n not in USUAL_HEADS for full in found[n] or [n]]
    )


def _check_tied(structure: Structure, chosen: Sequence[str]) -> None:
    """Training some of several tied modules would tear them apart without a word."""
    given = [name for name in structure.ties if name in chosen]
    others = [name for name in structure.ties if name not in chosen]
    if given and others:
        every = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in reversed(structure.ties)))
        raise ConfigError(
            f"adapter.train_also names {given[0]}, whose weight is tied to {', '.join(others)}: name all, [{every}],"
            f" and they train as one tensor"
        )


def renamed(trainable: Mapping[str, nn.Parameter], name: str, copy: FullCopy) -> dict[str, nn.Parameter]:
    """An adapter's trained tensors by full name, with those of another copy in place of its own of a module."""
    others = {key: parameter for key, parameter in trainable.items() if not key.startswith(f"{name}.")}
    return others | {f"{name}.trained.{leaf}": parameter for leaf, parameter in copy.trains()}


def file_keys(copies: Mapping[str, FullCopy], prefix: str) -> dict[str, nn.Parameter]:
    """What trains of copies by its key in a file, where PEFT sets `prefix` before the names of the model."""
    return {f"{prefix}{name}.{leaf}": p for name, module in copies.items() for leaf, p in module.trains()}


def build_copies(
    model: nn.Module, structure: Structure, names: Sequence[str], dtype: torch.dtype
) -> dict[str, FullCopy]:
    """A `FullCopy` for each module, tied ones sharing their trained weight. The model itself is left as it is."""
    copies = {name: FullCopy(model.get_submodule(name), dtype).train(model.training) for name in names}
    tied = [copies[name].trained for name in structure.ties if name in copies]
    for other in tied[1:]:
        other.weight = tied[0].weight
    return copies

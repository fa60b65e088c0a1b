"""Cut the width of every block: channels of its feed-forwards or heads of its attention.

In each block, for each projection that reads what is to go (its *reader*): the second moment of its inputs is
gathered over the calibration text, units are chosen (units.py), the small block is made of what is left (slices.py),
and the reader's columns that stay are fitted so that its output is as near as can be to what it was. Before that fit,
the small block has to put out what the large one does with the columns of the same units set to zero (proof.py). This
tells the right layout of fused projections from wrong ones, and what cannot be cut (slopes by head, norms over all
heads) from what can.

Shape suffixes: E experts, O out features, I in features, U units, K units that stay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.quant.dense import DenseConfig, DenseExperts, DenseLinear
from finetune.quant.freeze import freeze
from finetune.quant.gram import Gram
from finetune.quant.pruners.base import seen
from finetune.quant.pruners.cut import Cut, Run, put
from finetune.quant.pruners.proof import differs
from finetune.quant.pruners.slices import Layout, Part, assignments, filled
from finetune.quant.pruners.units import Chosen, NarrowConfig, choose
from finetune.quant.replay import watching
from finetune.structure import inspect
from finetune.structure.base import Projection
from finetune.structure.experiments import UNFORESEEN
from finetune.structure.widths import Build, shrunk

if TYPE_CHECKING:
    from finetune.quant.driver import Driver


class Narrow(Cut):
    """Takes units out of every block.

    Attributes:
        what: the units, in messages.
    """

    what: str

    def __init__(self, config: NarrowConfig) -> None:
        super().__init__()
        self.settings = config
        self._known: dict[Any, tuple[str, dict[str, Part]]] = {}

    @abstractmethod
    def narrowed(self, model: nn.Module, build: Build) -> Any:
        """The configuration of the small model.

        Raises:
            ConfigError, ModelError: as `plan`.
        """

    @abstractmethod
    def units(self, reader: Projection) -> int:
        """How many units a projection of the large model reads."""

    def fused(self) -> Sequence[Layout]:
        """Layouts that fused projections may have beside those of equal segments."""
        return ()

    def plan(self, model: nn.Module, build: Build) -> None:
        self.original, self.config = model.config, self.narrowed(model, build)
        full = inspect(model)
        self._small = build(self.config)
        self.structure = inspect(self._small)
        freeze(model, DenseConfig(), full)
        freeze(self._small, DenseConfig(), self.structure)
        self._shapes = shrunk(model, self._small, full.blocks) or {}
        narrow = {p.name: p.in_features for p in self.structure.projections}
        self._readers = [p for p in full.projections if p.in_features != narrow[p.name]]

    def begin(self, driver: Driver) -> None:
        compute_alike(self._small, driver.model)

    def lay_out(self, model: nn.Module, name: str) -> None:
        put(model, name, self._small.get_submodule(name))

    def block(self, driver: Driver, name: str, run: Run) -> None:
        block, empty = driver.model.get_submodule(name), self._small.get_submodule(name)
        readers = [p for p in self._readers if p.name.startswith(f"{name}.")]
        parts = self._layout(name, block, readers, run)
        grams = _grams(driver.model, block, readers, run)
        chosen = {p.name: self._choose(driver.model, p, parts, grams) for p in readers}
        kept = {reader: torch.stack([each.kept_K for each in found]) for reader, found in chosen.items()}
        small = filled(empty, block, name, parts, kept)
        why = differs(name, block, small, readers, _columns(readers, parts, kept), run)
        if why:
            raise self._cannot(name, why)
        for p in readers:
            _take(small.get_submodule(p.name.removeprefix(f"{name}.")), chosen[p.name])
        put(driver.model, name, small)
        for part in self.summary.parts[len(self.summary.parts) - len(readers) :]:
            errors = f"error {part['error']:.2e} (by size {part['error_magnitude']:.2e})"
            self.told(f"{part['name']}: {part['kept']} of {part['units']} {self.what} stay, {errors}", 1, 1)

    def _cannot(self, name: str, why: str) -> ModelError:
        return ModelError(
            f"{type(self._small).__name__} cannot lose {self.what}: a smaller {name} does not compute what is left of"
            f" it: {why}"
        )

    def _layout(self, name: str, block: nn.Module, readers: Sequence[Projection], run: Run) -> dict[str, Part]:
        """How the parameters of a block are to be read; found out on the first block of its shape."""
        inside = {n.removeprefix(f"{name}."): s for n, s in self._shapes.items() if n.startswith(f"{name}.")}
        key = tuple(sorted((n, s.before, s.after) for n, s in inside.items()))
        if key in self._known:
            first, found = self._known[key]
            return {_moved(n, first, name): replace(p, reader=_moved(p.reader, first, name)) for n, p in found.items()}
        units = {p.name: self.units(p) for p in readers}
        shapes = {f"{name}.{n}": s for n, s in inside.items()}
        why = "its rows are no multiple of what is to go"
        for parts in assignments(shapes, readers, units, self.fused()):
            kept = {p.name: _drawn(p, units[p.name], parts[f"{p.name}.weight"]) for p in readers}
            try:
                small = filled(self._small.get_submodule(name), block, name, parts, kept)
                why = differs(name, block, small, readers, _columns(readers, parts, kept), run)
            except UNFORESEEN as error:
                why = next(iter(str(error).splitlines()), type(error).__name__)
            if not why:
                self._known[key] = name, parts
                return parts
        raise self._cannot(name, why)

    def _choose(
        self, model: nn.Module, p: Projection, parts: Mapping[str, Part], grams: Mapping[tuple[str, int], Gram]
    ) -> list[Chosen]:
        """What stays of each matrix of a reader; it is reported."""
        module: Any = model.get_submodule(p.name)
        weight = module.dequantize(torch.float32)
        weight = weight.mT if isinstance(module, DenseExperts) and module.transposed else weight
        energies = [part.energies(model.get_parameter(name)) for name, part in parts.items() if part.reader == p.name]
        sizes_EU = torch.stack(energies).sum(0)
        shrunk_by = parts[f"{p.name}.weight"].shrunk
        stay = self.units(p) * shrunk_by.after // shrunk_by.before
        inputs = [grams.get((p.name, expert)) for expert in range(p.experts)]
        chosen = [
            choose(self.settings, w_OI, gram.matrix_II if gram and seen(gram.matrix_II) else None, sizes_U, stay)
            for w_OI, gram, sizes_U in zip(weight.view(p.experts, *weight.shape[-2:]), inputs, sizes_EU, strict=True)
        ]
        self.summary.parts.append(
            {
                "name": p.name,
                "units": self.units(p),
                "kept": stay,
                "error": sum(each.error for each in chosen) / p.experts,
                "error_magnitude": sum(each.error_magnitude for each in chosen) / p.experts,
                "damping": max((each.damping for each in chosen if each.damping is not None), default=None),
                "samples": sum(gram.samples for gram in inputs if gram is not None),
                "unseen": sum(gram is None for gram in inputs),
                "note": "; ".join(dict.fromkeys(each.note for each in chosen if each.note)),
            }
        )
        return chosen


def compute_alike(small: Any, model: Any) -> None:
    """Have a model attend in the way that another one does."""
    small.config._attn_implementation = model.config._attn_implementation


def _moved(name: str, block: str, other: str) -> str:
    """What a name inside a block is in another one."""
    return other + name.removeprefix(block)


def _columns(readers: Sequence[Projection], parts: Mapping[str, Part], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns of the readers that stay, [E, ..]."""
    return {p.name: parts[f"{p.name}.weight"].index(kept[p.name]) for p in readers}


def _drawn(reader: Projection, units: int, part: Part) -> Tensor:
    """Units drawn at random, for an experiment, [E, K]."""
    stay = units * part.shrunk.after // part.shrunk.before
    draw = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(units, generator=draw)[:stay].sort().values for _ in range(reader.experts)])


def _grams(model: nn.Module, block: nn.Module, readers: Sequence[Projection], run: Run) -> dict[tuple[str, int], Gram]:
    """Second moments of what each matrix of the readers reads; with a constant behind it where there is a bias."""
    found: dict[tuple[str, int], Gram] = {}
    biased = {p.name for p in readers if getattr(model.get_submodule(p.name), "bias", None) is not None}

    def saw(name: str, expert: int, x: Tensor) -> None:
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if name in biased else x
        found.setdefault((name, expert), Gram()).add(x)

    with watching(model, readers, saw):
        for _ in run(block):
            pass
    return found


def _take(module: nn.Module, chosen: Sequence[Chosen]) -> None:
    """Give a reader of the small block the columns that were fitted."""
    assert isinstance(module, DenseLinear | DenseExperts)
    weight = torch.stack([each.weight_OI for each in chosen])
    if isinstance(module, DenseExperts):
        module.store(weight.mT if module.transposed else weight)
        return
    module.store(weight[0])
    shift_O = chosen[0].shift_O
    if shift_O is not None and module.bias is not None:
        bias = module.bias.detach().float() + shift_O
        module.bias = nn.Parameter(bias.to(module.bias.dtype), requires_grad=False)

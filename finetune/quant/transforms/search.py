"""Which tensors of a block can be scaled, and what reads them: found by scaling them and looking.

- A norm's output is multiplied by powers of two. Whatever multiplies exactly that tensor by a matrix of its own shows
  the same factors in its input; the factors are then undone there, and the block is run again, until nothing new shows
  (the experts of a mixture are chosen by the router as before only once it is undone at the router). If the block then
  returns what it returned before, these are all its readers; else something else reads it too (a residual, a second
  norm) and the norm is left alone.
- A projection's output is multiplied in the same way. If each channel of another projection's input is then multiplied
  by one of the factors, whatever the token, the way between them is linear in each channel: values through attention
  (several channels from one, where heads share values), `up` through a gated activation, anything through a ReLU. The
  factor tells which output a channel comes from. Of fused projections some outputs qualify.

Nothing is known of families. What was found in one block is tried first on the next of the same shape.

Shape suffixes: N samples, K outputs of what gives a tensor, I inputs of what reads it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.quant.transforms.probe import SLACK, Probe, Seen
from finetune.structure.base import Projection, Structure
from finetune.structure.inspect import routers
from finetune.structure.norms import norms

EXPONENTS = (-4, -3, -2, -1, 1, 2, 3, 4)
"""Of the factors; none is 0, so that what was multiplied differs from what was not."""
MOST_PARTS = 512
"""Runs of equal parts of a fused projection that are tried one by one."""
ROUNDS = 4
"""Readers that show only once earlier ones are undone: router, experts, and one to see that there are no more."""


@dataclass(frozen=True)
class Scaling:
    """A tensor that may be scaled channel by channel.

    Attributes:
        source: name of the norm or projection that gives it.
        readers: names of all that multiply it: projections, stacks of experts, routers.
        rows_I: for each channel that is read, which output of the source it comes from.
        is_norm: whether the source is a norm.
        offset: of a norm: what it adds to its weight before it multiplies by it (1 in Gemma, else 0).
    """

    source: str
    readers: tuple[str, ...]
    rows_I: Tensor
    is_norm: bool
    offset: float = 0.0


class Search:
    """Finds the scalings of block after block.

    Attributes:
        notes: norms that cannot be scaled though projections read them, and why.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.model, self.structure = model, structure
        self.notes: list[str] = []
        self._known: dict[Any, tuple[str, list[Scaling], list[str]]] = {}
        # By name, since blocks may be brought into memory one after the other.
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._shared = {name for alike in names.values() if len(alike) > 1 for name in alike}

    @torch.no_grad()
    def scalings(self, block: str, go: Callable[[], object]) -> list[Scaling]:
        """The scalings of a block, in the order in which their tensors are made.

        Args:
            go: runs the block on one batch; more than one token in it.
        """
        projections = [p for p in self.structure.projections if p.name.startswith(f"{block}.")]
        probe = Probe(self.model, block, projections, routers(self.model, block), go)
        parts = self.model.get_submodule(block).named_parameters()
        shape = tuple((name, tuple(parameter.shape)) for name, parameter in parts)
        if shape in self._known:
            first, before, notes = self._known[shape]
            known = [_renamed(scaling, first, block) for scaling in before]
            if all(self._holds(probe, scaling) for scaling in known):
                self.notes += [note.replace(f"{first}.", f"{block}.") for note in notes]
                return known
        said = len(self.notes)
        found = [s for name in norms(self.model) if name.startswith(f"{block}.") and (s := self._norm(probe, name))]
        taken = {reader for scaling in found for reader in scaling.readers}
        for p in projections:
            pair = self._pair(probe, p)
            if pair is not None and taken.isdisjoint(pair.readers):
                found.append(pair)
                taken.update(pair.readers)
        self._known[shape] = (block, found, self.notes[said:])
        return found

    def _holds(self, probe: Probe, scaling: Scaling) -> bool:
        """Whether scaling a tensor and undoing it at its readers changes nothing in the block."""
        if scaling.is_norm and self._offset(probe, scaling.source) != scaling.offset:
            return False
        width = len(scaling.rows_I) if scaling.is_norm else self._width(probe, scaling.source)
        by_K = _factors(torch.arange(width, device=scaling.rows_I.device), 0)
        if not scaling.is_norm:
            inert_K = torch.ones_like(by_K)
            inert_K[scaling.rows_I] = by_K[scaling.rows_I]
            by_K = inert_K
        seen = probe.run(scaling.source, by_K, {name: by_K[scaling.rows_I] for name in scaling.readers})
        return probe.same(seen) and not self._is_shared((scaling.source, *scaling.readers))

    def _width(self, probe: Probe, source: str) -> int:
        return probe.projections[source].out_features

    def _is_shared(self, names: Sequence[str]) -> bool:
        """Whether a parameter that would be changed serves elsewhere, too."""
        return any(shared == name or shared.startswith(f"{name}.") for shared in self._shared for name in names)

    def _norm(self, probe: Probe, name: str) -> Scaling | None:
        """The readers of a norm, or None: with a note where projections read it, without where none does."""
        weight = self.model.get_parameter(f"{name}.weight")
        by_I = _factors(torch.arange(len(weight), device=weight.device), 0)
        readers: list[str] = []
        seen = probe.base
        for _ in range(ROUNDS):
            seen = probe.run(name, by_I, dict.fromkeys(readers, by_I))
            new = [n for n, x in seen.inputs.items() if n not in readers and _is_times(probe.base, n, x, by_I)]
            readers += new
            if not new:
                break
        if not any(reader in probe.projections for reader in readers):
            return None
        unused, unknown = _unused(probe, readers, len(weight))
        offset = self._offset(probe, name)
        why = ""
        if not probe.same(seen):
            why = "something beside projections reads what it puts out"
        elif unknown:
            why = f"{unknown[0]} was not used and may read it"
        elif offset is None:
            why = "its output is not a multiple of its weight"
        elif self._is_shared((name, *readers, *unused)):
            why = "its weight, or that of one of its readers, serves elsewhere too"
        if why or offset is None:
            self.notes.append(f"{name} was left as it is: {why}")
            return None
        return Scaling(name, (*readers, *unused), torch.arange(len(weight), device=weight.device), True, offset)

    def _offset(self, probe: Probe, name: str) -> float | None:
        """What a norm adds to its weight before it multiplies by it, or None where it does something else."""
        inputs: list[Tensor] = []
        module = self.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _m, args: inputs.extend(args[:1]))
        try:
            probe.go()
        finally:
            handle.remove()
        return None if not inputs else norm_offset(module, inputs[0])

    def _pair(self, probe: Probe, p: Projection) -> Scaling | None:
        """What reads the output of a projection channel by channel."""
        device = next(self.model.get_submodule(p.name).parameters()).device
        for rows_K in self._candidates(probe, p, device):
            reader = _linear_reader(probe, probe.run(p.name, _on(rows_K, 0)), p)
            if reader is None:
                continue
            rows_I = _origins(probe, p, rows_K, reader)
            if rows_I is None:
                continue
            scaling = Scaling(p.name, (reader,), rows_I, is_norm=False)
            return scaling if self._holds(probe, scaling) else None
        return None

    def _candidates(self, probe: Probe, p: Projection, device: torch.device) -> Iterator[Tensor]:
        """Outputs of a projection that may qualify together: all; one of its equal parts; some of its heads."""
        whole_K = torch.ones(p.out_features, dtype=torch.bool, device=device)
        yield whole_K
        first = torch.zeros_like(whole_K)
        first[0] = True
        touched = _touched(probe, probe.run(p.name, _on(first, 0)), p)
        for reader, channels in touched:
            width = probe.base.inputs[reader].shape[-1]
            for size in (width, channels):
                if not 1 < size < p.out_features or p.out_features % size or p.out_features // size > MOST_PARTS:
                    continue
                parts = [_part(whole_K, start, size) for start in range(0, p.out_features, size)]
                linear = [
                    rows
                    for rows in parts
                    if _linear_reader(probe, probe.run(p.name, _on(rows, 0)), p, partly=True) == reader
                ]
                if linear:
                    yield torch.stack(linear).any(0)


def norm_offset(module: nn.Module, x: Tensor) -> float | None:
    """What a norm adds to its weight before it multiplies by it; None where its output is not linear in the weight.

    Tried on the module in float32 with the weights 0, 1 and 2; the bias is what it gives without a factor.
    """
    twin, x = copy.deepcopy(module).float(), x.detach().float()
    outputs = []
    for value in (0.0, 1.0, 2.0):
        twin.weight.fill_(value)  # type: ignore[operator]
        if getattr(twin, "bias", None) is not None:
            twin.bias.zero_()  # type: ignore[operator,union-attr]
        outputs.append(twin(x))
    zero, one, two = outputs
    unit, size = one - zero, float((one - zero).abs().max())
    if size == 0 or float((two - one - unit).abs().max()) > 1e-4 * size:
        return None
    for offset in (0.0, 1.0):
        if float((zero - offset * unit).abs().max()) <= 1e-4 * size:
            return offset
    return None


def _factors(numbers: Tensor, place: int) -> Tensor:
    """Powers of two that write a number's digit at a place."""
    digits = torch.tensor(EXPONENTS, device=numbers.device)[(numbers // len(EXPONENTS) ** place) % len(EXPONENTS)]
    return torch.exp2(digits.float())


def _on(rows_K: Tensor, place: int) -> Tensor:
    """Factors for some outputs of a projection, 1 for the others."""
    by_K = _factors(torch.arange(len(rows_K), device=rows_K.device), place)
    return torch.where(rows_K, by_K, 1.0)


def _part(whole_K: Tensor, start: int, size: int) -> Tensor:
    part = torch.zeros_like(whole_K)
    part[start : start + size] = True
    return part


def _is_times(base: Seen, name: str, x_NI: Tensor, by_I: Tensor) -> bool:
    """Whether an input is what it was, times factors."""
    before = base.inputs.get(name)
    if before is None or before.shape != x_NI.shape or before.shape[-1] != len(by_I) or not before.any():
        return False
    return bool((_off(before, x_NI, by_I) <= SLACK * torch.finfo(x_NI.dtype).eps).all())


def _off(before_NI: Tensor, after_NI: Tensor, by_I: Tensor) -> Tensor:
    """The largest difference of a channel from what it was times a factor, as a share of the channel."""
    wanted_NI = before_NI.float() * by_I
    largest_I = wanted_NI.abs().amax(0)
    return (after_NI.float() - wanted_NI).abs().amax(0) / largest_I.clamp(min=torch.finfo(torch.float32).tiny)


def _exponents(before_NI: Tensor, after_NI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each channel: the power of two that it was multiplied by, whether exactly, and whether it is all zero."""
    places_I = before_NI.abs().argmax(0, keepdim=True)
    peak_I, now_I = before_NI.gather(0, places_I)[0].float(), after_NI.gather(0, places_I)[0].float()
    zero_I = peak_I == 0
    ratio_I = torch.where(zero_I, 1.0, now_I / torch.where(zero_I, 1.0, peak_I))
    power_I = ratio_I.clamp(min=2.0**-20).log2().round()
    exact_I = _off(before_NI, after_NI, torch.exp2(power_I)) <= SLACK * torch.finfo(before_NI.dtype).eps
    return power_I.long(), exact_I, zero_I & (after_NI.abs().amax(0) == 0)


def _linear_reader(probe: Probe, seen: Seen, source: Projection, *, partly: bool = False) -> str | None:
    """The projection whose input channels were all multiplied by factors.

    Args:
        partly: some channels suffice, where the others did not change.
    """
    for name, x_NI in seen.inputs.items():
        before = probe.base.inputs.get(name)
        if name == source.name or name not in probe.projections or before is None or before.shape != x_NI.shape:
            continue
        power_I, exact_I, zero_I = _exponents(before, x_NI)
        moved_I = (power_I != 0) & ~zero_I
        if bool(exact_I.all()) and bool(moved_I.any() if partly else (moved_I | zero_I).all() and moved_I.any()):
            return name
    return None


def _touched(probe: Probe, seen: Seen, source: Projection) -> list[tuple[str, int]]:
    """Projections whose inputs changed, and in how many channels; the first in order of their calls, which reads it."""
    for name, x_NI in seen.inputs.items():
        before = probe.base.inputs.get(name)
        if name == source.name or name not in probe.projections or before is None or before.shape != x_NI.shape:
            continue
        changed = int((before != x_NI).any(0).sum())
        if changed:
            return [(name, changed)]
    return []


def _origins(probe: Probe, p: Projection, rows_K: Tensor, reader: str) -> Tensor | None:
    """Which output each channel of a reader comes from, digit by digit; None where that cannot be told."""
    digit_of = {power: digit for digit, power in enumerate(EXPONENTS)}
    before = probe.base.inputs[reader]
    numbers_I = torch.zeros(before.shape[-1], dtype=torch.long, device=before.device)
    zero_I = torch.zeros_like(numbers_I, dtype=torch.bool)
    place = 0
    while len(EXPONENTS) ** place < p.out_features:
        after = probe.run(p.name, _on(rows_K, place)).inputs.get(reader)
        if after is None or after.shape != before.shape:
            return None
        power_I, exact_I, zero_I = _exponents(before, after)
        digits = [digit_of.get(power) for power in power_I.tolist()]
        if not bool(exact_I.all()) or any(d is None and not z for d, z in zip(digits, zero_I.tolist(), strict=True)):
            return None
        numbers_I += torch.tensor([d or 0 for d in digits], device=before.device) * len(EXPONENTS) ** place
        place += 1
    alive_I = ~zero_I
    channels_I = torch.arange(len(numbers_I), device=before.device)
    if zero_I.any():  # a ReLU may be silent on one batch: its neighbours say where the channel comes from
        shifts = (numbers_I - channels_I)[alive_I].unique()
        if len(shifts) != 1:
            return None
        numbers_I = channels_I + shifts
    inside = bool((numbers_I >= 0).all()) and bool((numbers_I < len(rows_K)).all())
    return numbers_I if inside and bool(rows_K[numbers_I].all()) else None


def _unused(probe: Probe, readers: Sequence[str], width: int) -> tuple[list[str], list[str]]:
    """Of the projections that were not used: those that read it as their like do, and those of which nothing is known.

    Experts in a list have names that differ in a number; which of them see tokens depends on the batch.
    """
    like, others = {_pattern(name) for name in readers}, {_pattern(name) for name in probe.base.inputs}
    idle = [p for p in probe.projections.values() if p.name not in probe.base.inputs and p.in_features == width]
    same = [p.name for p in idle if _pattern(p.name) in like]
    return same, [p.name for p in idle if _pattern(p.name) not in like | others]


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _renamed(scaling: Scaling, old: str, new: str) -> Scaling:
    """The same in another block."""

    def moved(name: str) -> str:
        return f"{new}.{name.removeprefix(f'{old}.')}"

    readers = tuple(moved(reader) for reader in scaling.readers)
    return Scaling(moved(scaling.source), readers, scaling.rows_I, scaling.is_norm, scaling.offset)

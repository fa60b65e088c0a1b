"""What leaves the house: an emulator's files, and the check that no weight of the middle is in them as it is.

Shape suffixes: O out features, I in features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.export.base import ExportSource
from finetune.export.merge import Stock, frozen_at, merged_weights, stored_weight
from finetune.export.stock import write_config, write_tokenizer, write_weights
from finetune.model.stored import quantization_config
from finetune.offsite.cut import Cut
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.freeze import empty_frozen
from finetune.structure.inspect import projection_of

Weights = Iterator[tuple[str, Tensor]]


@dataclass
class Middle:
    """What the middle of the full model consists of, as digests, and what was seen of it in files.

    Attributes:
        own: digest of a tensor, or of one expert of a stack -> its name in the full model.
        elsewhere: digests of what lies outside the middle.
        seen: names, in the full model, of tensors of the middle that were written exactly as they are.
    """

    own: dict[bytes, str] = field(default_factory=dict)
    elsewhere: set[bytes] = field(default_factory=set)
    seen: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, cut: Cut) -> Middle:
        """Of the full model, in memory as it is stored."""
        found, stock = cls(), Stock.of(model)
        inside = tuple(f"{name}." for name in cut.full_middle())
        for name in stock.names:
            weight = stored_weight(model, name, stock.projections.get(name))
            prints = _prints(weight.to(_stored_dtype(model, name)))
            if name.startswith(inside):
                found.own |= dict.fromkeys(prints, name)
            else:
                found.elsewhere |= set(prints)
        return found

    def watch(self, weights: Weights) -> Weights:
        """Hand weights on, noting those that are the middle's own."""
        for name, weight in weights:
            self.seen += [self.own[d] for d in _prints(weight) if d in self.own and d not in self.elsewhere]
            yield name, weight

    def judge(self, cut: Cut, verbatim: bool) -> None:
        """Refuse files that hold what they must not.

        Raises:
            ConfigError: for a tensor of a block that was dropped, and unless allowed for any of the middle.
        """
        dropped = tuple(f"{cut.full_names[number]}." for number in cut.dropped)
        wrong = [name for name in self.seen if name.startswith(dropped) or not verbatim]
        if wrong:
            count = f"{len(wrong)} tensors" if len(wrong) > 1 else "a tensor"
            raise ConfigError(
                f"{count} of the middle would leave as they are, first {wrong[0]}: set offsite.distill_steps (more of"
                " them) or offsite.quant, or allow it by offsite.verbatim=true"
            )


def _prints(weight: Tensor) -> list[bytes]:
    """Digests of a tensor's bytes and of those of each matrix of a stack; none of what is constant."""
    pieces = [weight, *weight] if weight.dim() == 3 else [weight]
    return [
        hashlib.sha256(piece.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()
        for piece in pieces
        if piece.numel() > 1 and bool((piece != piece.flatten()[0]).any())
    ]


def _stored_dtype(model: nn.Module, name: str) -> torch.dtype:
    """The dtype in which a loaded, dense model holds a weight of that stock name."""
    path, _, leaf = name.rpartition(".")
    frozen: Any = frozen_at(model, name) or (frozen_at(model, path) if leaf == "weight" else None)
    return frozen.weight.dtype if frozen is not None else stored_weight(model, name, None).dtype


def as_stored(source: ExportSource, stock: Stock) -> Weights:
    """Every weight of a model with its adapter merged in, each in the dtype that the model holds it in."""
    for name, weight in merged_weights(source, stock):
        yield name, weight.to(_stored_dtype(source.model, name))


def write_model(source: ExportSource, directory: Path) -> None:
    """A dense model as a checkpoint of its family; what no adapter changed is written bit for bit."""
    stock = Stock.of(source.model)
    write_weights(source, stock, as_stored(source, stock), directory)
    write_config(source, directory, untied=False)
    write_tokenizer(source, directory)


def write_plain(source: ExportSource, cut: Cut, directory: Path) -> None:
    """The full model without the dropped blocks, all others as they are: for the owner's eyes alone."""
    full = Stock.of(source.model)
    skeleton = _empty(source.model, cut)
    stock = Stock.of(skeleton)

    def weights() -> Weights:
        for name in stock.names:
            own = cut.in_full(name)
            weight = stored_weight(source.model, own, full.projections.get(own))
            yield name, weight.to(_stored_dtype(source.model, own))

    write_weights(source, stock, weights(), directory)
    write_config(replace(source, model=skeleton), directory, untied=False)
    write_tokenizer(source, directory)


def _empty(model: Any, cut: Cut) -> Any:
    """The emulator without weights, with the full model's generation settings."""
    with torch.device("meta"):
        empty = type(model)(cut.config)
    empty.generation_config = getattr(model, "generation_config", None)
    return empty


def write_emulator(
    source: ExportSource, cut: Cut, quant: QuantConfig | None, middle: Middle, directory: Path, *, round_rest: bool
) -> None:
    """The emulator's files.

    Args:
        source: the emulator in memory, dense, with what distillation has taught it as its adapter.
        quant: storage of the middle's projections; None leaves them dense. Stacked experts are rounded to it and stored
            decoded, because stock checkpoints have no place for packed ones.
        middle: notes what of the full middle gets into the files.
        round_rest: round what is no projection (norms, biases, routers) to 8 bits, by tensor.
    """
    stock = Stock.of(source.model)
    packed: list[str] = []
    inside = tuple(f"{cut.names[number]}." for number in cut.middle)

    def weights() -> Weights:
        for name, weight in as_stored(source, stock):
            projection = stock.projections.get(name)
            if quant is None or not name.startswith(inside):
                yield name, weight
            elif projection is None:
                yield name, _eight_bits(weight) if round_rest else weight
            elif projection.kind == "experts":
                stack = empty_frozen(quant, projection, weight, dtype=weight.dtype, device=weight.device)
                stack.store(weight)
                yield name, stack.dequantize(torch.float32).to(weight.dtype)  # type: ignore[operator]
            else:
                w_OI = weight.T.contiguous() if projection.transposed else weight
                module = QUANTIZERS.build(quant, *w_OI.shape, bias=False, dtype=weight.dtype, device=weight.device)
                module.store(w_OI)
                packed.append(projection.name)
                yield from module.state_dict(prefix=f"{projection.name}.").items()

    write_weights(source, stock, middle.watch(weights()), directory)
    linears = [n for n, module in stock.model.named_modules() if projection_of(module, n) is not None]
    kept = [name for name in linears if name not in packed]
    told = quantization_config(quant, source.dtype, kept) if quant is not None and packed else None
    write_config(source, directory, untied=False, quantization_config=told)
    write_tokenizer(source, directory)


def _eight_bits(weight: Tensor) -> Tensor:
    """Round to 255 steps of a tensor's largest magnitude."""
    if not weight.is_floating_point():
        return weight
    step = weight.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny) / 127
    return ((weight.float() / step).round() * step).to(weight.dtype)

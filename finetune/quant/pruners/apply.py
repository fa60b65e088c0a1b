"""Prune a weight and store what is left: as it is, or in codes that hold its zeros exactly.

A pruner that chooses codes does so in its own sweep, on the grid that spans what it would leave without codes: what it
corrects grows beyond the weights that were there. For any other the pruned weight is rounded as every weight is, its
zeros kept (quant/rounders/zeros.py).

Shape suffixes: E experts, O out features, I in features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.quant.base import FrozenExperts, FrozenLinear
from finetune.quant.grid import Grid
from finetune.quant.packed import PackedWeight
from finetune.quant.pruners.base import Pruned, Pruner, seen
from finetune.quant.rounders import base as rounders
from finetune.quant.rounders.base import Rounded, Rounder, squared
from finetune.quant.rounders.zeros import MaskedGrid, ZerosKept


@dataclass(frozen=True)
class Outcome:
    """What pruning did to one weight.

    Attributes:
        rounded: errors against the weight as it was; `error_rtn` is that of as many weights pruned by magnitude and
            the rest rounded to nearest.
        sparsity: share of the stored weights that are exactly zero.
    """

    rounded: Rounded
    sparsity: float


@torch.no_grad()
def prune(
    pruner: Pruner,
    rounder: Rounder,
    module: FrozenLinear | FrozenExperts,
    weight: Tensor,
    grams: Sequence[Tensor | None],
) -> Outcome:
    """Store a pruned weight in a frozen module, empty or filled, on its device.

    Args:
        rounder: chooses the codes where the pruner does not; its grid is taken in any case.
        weight: as `module.store` takes it.
        grams: as in `rounders.base.apply`; empty without calibration.

    Raises:
        ModelError: when a weight is not finite and the module is packed.
    """
    turned = isinstance(module, FrozenExperts) and bool(getattr(module, "transposed", False))
    packed = module if isinstance(module, PackedWeight) and module.settings().rounds else None
    laid = (weight.mT if turned else weight).to(next(module.parameters()).device)
    matrices = list(laid.float()) if laid.dim() == 3 else [laid.float()]
    calibrated = bool(grams)
    grams = [None if gram is None else gram.to(matrices[0]) for gram in grams] or [None] * len(matrices)
    results = [pruner.prune(w_OI, gram_II) for w_OI, gram_II in zip(matrices, grams, strict=True)]
    damping, notes = _told(results)
    pruned = torch.stack([result.w_OI for result in results]).view_as(laid)
    grids: Sequence[Grid | None] = [None] * len(matrices)
    grid: Grid | None = None
    if packed is None:
        module.store((pruned.mT if turned else pruned).to(weight.dtype))
    else:
        packed.store(pruned.mT if turned else pruned)
        grid = rounder.fit(packed, pruned)
        grids = [grid.expert(number) for number in range(len(matrices))] if laid.dim() == 3 else [grid]
        if pruner.chooses_codes:
            chosen = [pruner.prune(*each).codes_OI for each in zip(matrices, grams, grids, strict=True)]
            packed.take(grid, torch.stack([codes_OI for codes_OI in chosen if codes_OI is not None]).view_as(laid))
        else:
            inner = rounders.apply(
                ZerosKept(rounder), packed, pruned.mT if turned else pruned, grams if calibrated else []
            )
            damping, notes = inner.damping, [*notes, *filter(None, [inner.note])]
    decoded = module.dequantize(torch.float32)
    decoded = (decoded.mT if turned else decoded).view(len(matrices), *laid.shape[-2:])
    errors = _errors(pruner, matrices, decoded, grams, grids)
    zero = decoded == 0
    kept = None if grid is None else MaskedGrid(grid, ~zero.view_as(laid))
    return Outcome(Rounded(*errors, damping, "; ".join(notes), kept), float(zero.float().mean()))


def _told(results: Sequence[Pruned]) -> tuple[float | None, list[str]]:
    """The largest damping that was needed, and what there is to know, each thing once."""
    damping = max((result.damping for result in results if result.damping is not None), default=None)
    counted = Counter(result.note for result in results if result.note)
    return damping, [f"{n} of its experts: {note}" if len(results) > 1 else note for note, n in counted.items()]


def _errors(
    pruner: Pruner,
    matrices: Sequence[Tensor],
    decoded: Tensor,
    grams: Sequence[Tensor | None],
    grids: Sequence[Grid | None],
) -> tuple[float, float]:
    """`error_rtn` and `error` over the matrices that saw inputs, or over all, as weights, where none did."""
    watched = any(seen(gram) for gram in grams)
    energy = naive = after = 0.0
    for w_OI, stored_OI, gram_II, grid in zip(matrices, decoded, grams, grids, strict=True):
        if watched and not seen(gram_II):
            continue
        gram_II = gram_II if watched else None
        kept_OI = pruner.by_magnitude(w_OI)
        simple_OI = torch.where(kept_OI, w_OI, 0)
        if grid is not None:
            simple_OI = grid.decode(MaskedGrid(grid, kept_OI).round_columns(w_OI, 0))
        energy += squared(w_OI, gram_II)
        naive += squared(w_OI - simple_OI, gram_II)
        after += squared(w_OI - stored_OI, gram_II)
    share = 1 / energy if energy > 0 else 0.0
    return naive * share, after * share

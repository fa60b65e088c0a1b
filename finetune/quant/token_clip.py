"""Token-wise clipping of Outlier Suppression (Wei et al. 2022, arXiv:2209.13325, section 4.2): static ranges of inputs.

The largest input of all is often that of a few tokens that matter little, and it sets the steps of all the others. The
search is coarse first: each token has a largest magnitude, and the ranges that are tried are quantiles of those, so
that a step of the search is a share of the tokens and not of the range. Then it is fine: along a line between the
neighbours of the best. What counts is the error that rounding makes in the outputs of whatever reads the tensor.

Where this departs from the paper: the loss is that of the readers' outputs, one layer after the other, not of the
model's; ranges are symmetric; the fine stage is a search along a line in the place of gradient descent.

Shape suffixes: N tokens, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from finetune.kernels import w8a8
from finetune.quant.base import FrozenLinear
from finetune.quant.gram import Gram
from finetune.quant.replay import watching
from finetune.structure.base import Projection

SPANS = {8: 0.1, 6: 0.3}
"""Share of the tokens that may be cut at most, by bits, as in the authors' code."""
STEP = 0.01
"""Share of the tokens from one coarse range to the next."""
FINE = 8
"""Ranges that are tried on either side of the best coarse one."""
TOKENS = 4096
"""That the error is taken over, at most, spread evenly over the calibration data."""


@torch.no_grad()
def clip_tokens(
    model: nn.Module,
    reader: Projection,
    readers: Sequence[Projection],
    gram: Gram,
    bits: int,
    forward: Callable[[], Iterator[Tensor]],
) -> None:
    """Search the range of a tensor; `gram.limit` is what was found.

    Args:
        model: whose projections are dense frozen modules.
        reader: one that reads the tensor.
        readers: all of them; the range is theirs together.
        gram: of the tensor over all batches.
        bits: of its codes.
        forward: runs the block over all batches.
    """
    gram_II: Tensor | None = None
    for p in readers:
        module = model.get_submodule(p.name)
        assert isinstance(module, FrozenLinear)
        w_OI = module.dequantize(torch.float32)
        gram_II = w_OI.T @ w_OI if gram_II is None else gram_II.addmm_(w_OI.T, w_OI)
    assert gram_II is not None
    step, parts, seen = -(-gram.samples // TOKENS), [], [0]

    def saw(_name: str, _expert: int, x: Tensor) -> None:
        x_NI = x.detach().reshape(-1, x.shape[-1])
        parts.append(x_NI[-seen[0] % step :: step].float())
        seen[0] += len(x_NI)

    with watching(model, [reader], saw):
        for _ in forward():
            pass
    gram.limit = best_limit(torch.cat(parts), gram.largest_N(), gram_II, bits)


def best_limit(x_NI: Tensor, largest_N: Tensor, gram_II: Tensor, bits: int) -> Tensor:
    """The magnitude at which inputs are best clipped, a float32 scalar; the largest one where clipping does not help.

    Args:
        x_NI: tokens that the error is taken over.
        largest_N: the largest magnitude of each token there is.
        gram_II: sum of W^T W over whatever reads them: the error of x is that of x W^T.
        bits: of the codes.
    """
    most = w8a8.levels(bits)

    def error(limit: float) -> float:
        scale = torch.tensor(limit / most, device=x_NI.device)
        delta_NI = w8a8.round_to(x_NI, scale, -most - 1, most).float() * scale - x_NI
        return float(((delta_NI @ gram_II) * delta_NI).sum(dtype=torch.float64))

    count = round(SPANS[bits] / STEP)
    shares = torch.linspace(1, 1 - SPANS[bits], count + 1)
    ordered_N = largest_N.sort().values
    places = ((len(ordered_N) - 1) * shares).round().long()
    coarse = sorted({float(ordered_N[place]) for place in places.tolist()} - {0.0}, reverse=True)
    if not coarse:
        return largest_N.amax()
    errors = {limit: error(limit) for limit in coarse}
    best = coarse.index(min(coarse, key=errors.__getitem__))
    ends = (coarse[max(best - 1, 0)], coarse[best], coarse[best + 1] if best + 1 < len(coarse) else coarse[best] / 2)
    for high, low in (ends[:2], ends[1:]):
        for number in range(1, FINE + 1):
            limit = high - (high - low) * number / (FINE + 1)
            if limit not in errors:
                errors[limit] = error(limit)
    return largest_N.new_tensor(min(errors, key=errors.__getitem__))

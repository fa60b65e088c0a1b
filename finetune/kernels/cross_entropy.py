"""Cross entropy straight from hidden states, so that the logits of all positions never exist at once.

For a row of hidden states h and a head W, b the logits are `z = cap(scale * (W h + b))` with `cap(z) = c tanh(z / c)`
where the model caps them, and the loss is `logsumexp(z) - z[label]`. Rows are taken a chunk at a time; the gradient of
a chunk, `softmax(z) - onehot`, is folded into the gradient of the hidden states (and of the head, where it trains)
before its logits are dropped. This is the scheme of Cut Cross-Entropy (Wijmans et al. 2025, arXiv:2411.09009) and of
Liger Kernel's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989, section 3.2).

Two operators: `finetune::linear_cross_entropy` goes over the chunks, `finetune::cross_entropy_` turns the logits of one
into their gradient. The second is what a backend supplies; plain torch serves below.

Shape suffixes: N positions, L learnt positions, C positions of one chunk, H hidden features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.kernels import cpu_cross_entropy
from finetune.kernels.autocast import no_autocast

IGNORE = -100
CHUNK_BYTES = 32 * 2**20
"""Bytes that the float32 logits of a chunk may take."""
MOST_ROWS = 256
"""Products over more rows are no faster, and their logits are the peak of a small model's memory."""
ROUND_ROWS = 128
"""Products run over a multiple of so many rows. How many positions are learnt differs from step to step, and oneDNN
compiles and keeps a kernel for every shape it meets: without the rounding memory grows with every step."""

_library = torch.library.Library("finetune", "FRAGMENT")
_library.define("cross_entropy_(Tensor(a!) z, Tensor labels, float scale, float? softcap, bool gradient) -> Tensor")
_library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap, "
    "int rows, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)"
)


def chunk_rows(vocab: int) -> int:
    """Positions whose float32 logits fit `CHUNK_BYTES`, whole multiples of `ROUND_ROWS` where that many do, at most
    `MOST_ROWS`; at least 16, as products over fewer waste the machine."""
    rows = min(MOST_ROWS, max(16, CHUNK_BYTES // (4 * vocab)))
    return rows - rows % ROUND_ROWS if rows > ROUND_ROWS else rows


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The SUM of cross entropies over the positions whose label is not -100.

    Args:
        hidden_NH: input of the head; the logits are computed in its dtype, everything after them in float32.
        weight_VH: of the head; gets a gradient where it requires one.
        labels_N: int64 token to predict at each position, -100 for none.
        bias_V: of the head.
        scale: what the model multiplies its logits by.
        softcap: bound c of `c tanh(z / c)`, applied after the scale; None for none.
        chunk: positions at a time; None takes `chunk_rows(V)`.

    Returns:
        float32 scalar. It has a first derivative only.

    Raises:
        IndexError: for a label that is no token.
    """
    parts = (hidden_NH, weight_VH, bias_V)
    needed = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in parts]
    loss, *_ = torch.ops.finetune.linear_cross_entropy(
        *parts, labels_N, scale, softcap, chunk or chunk_rows(weight_VH.shape[0]), needed
    )
    return loss


def rounded(rows_CX: Tensor, chunk: int) -> Tensor:
    """The same rows with zero rows behind them, up to a multiple of `ROUND_ROWS` (of the chunk where that is less)."""
    missing = -len(rows_CX) % min(ROUND_ROWS, chunk)
    return F.pad(rows_CX, (0, 0, 0, missing)) if missing else rows_CX


def logits_of(z_CV: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What a model makes of its head's output: `cap(scale * z)`, in the dtype of `z`."""
    if scale != 1.0:
        z_CV = z_CV * scale
    return z_CV if softcap is None else torch.tanh(z_CV / softcap) * softcap


def cross_entropy_(z_CV: Tensor, labels_C: Tensor, scale: float, softcap: float | None, gradient: bool) -> Tensor:
    """Summed loss of a chunk, float32; where asked for, its gradient replaces the head's output `z_CV`."""
    logits_CV = logits_of(z_CV.float(), scale, softcap)
    log_norm_C = torch.logsumexp(logits_CV, dim=-1)
    picked_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    loss = (log_norm_C - picked_C).sum()
    if gradient:
        slope_CV = None if softcap is None else (1 - (logits_CV / softcap) ** 2)
        grad_CV = torch.exp(logits_CV - log_norm_C[:, None])
        grad_CV.scatter_add_(1, labels_C[:, None], torch.full_like(picked_C, -1.0)[:, None])
        if slope_CV is not None:
            grad_CV.mul_(slope_CV)
        z_CV.copy_(grad_CV.mul_(scale) if scale != 1.0 else grad_CV)
    return loss


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    rows: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and the gradients of hidden, weight and bias, those not needed empty."""
    dtype, learnt_N = hidden.dtype, labels != IGNORE
    with no_autocast(hidden):
        h_LH, labels_L = hidden[learnt_N], labels[learnt_N]
        w_VH = weight.to(dtype)
        b_V = None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = _Gradients(h_LH, weight, bias, needed)
        for start in range(0, len(labels_L), rows):
            cut = slice(start, start + rows)
            z_CV = F.linear(rounded(h_LH[cut], rows), w_VH, b_V)[: len(labels_L[cut])]
            if grads.exact:
                z_CV = z_CV.float()
            total += torch.ops.finetune.cross_entropy_(z_CV, labels_L[cut], scale, softcap, any(needed))
            grads.add(cut, z_CV, w_VH, rows)
        return total, *grads.result(learnt_N)


class _Gradients:
    """What the chunks' gradients add up to.

    Attributes:
        exact: whether chunks' gradients have to come in float32, because the head's own are sums over all of them.
    """

    def __init__(self, h_LH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, needed: list[bool]) -> None:
        self.h_LH, self.exact = h_LH, needed[1] or needed[2]
        # The gradient of a sum over one position is at most a row of W: float16 would flush its small parts to zero
        # before the loss scale reaches them.
        kept = torch.float32 if h_LH.dtype == torch.float16 else h_LH.dtype
        self.h = h_LH.new_empty(h_LH.shape if needed[0] else [0], dtype=kept)
        self.w = h_LH.new_zeros(weight_VH.shape if needed[1] else [0], dtype=torch.float32)
        self.b = h_LH.new_zeros(bias_V.shape if bias_V is not None and needed[2] else [0], dtype=torch.float32)
        self.needed = needed

    def add(self, cut: slice, grad_CV: Tensor, w_VH: Tensor, rows: int) -> None:
        """Fold in the gradient of the logits at the positions of `cut`."""
        if self.needed[0]:
            grad_CH = rounded(grad_CV.to(w_VH.dtype), rows) @ w_VH
            self.h[cut] = grad_CH[: len(grad_CV)]
        if self.needed[1]:
            self.w.addmm_(grad_CV.t(), self.h_LH[cut].float())
        if self.needed[2]:
            self.b += grad_CV.sum(0)

    def result(self, learnt_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, zero at positions that are not learnt."""
        if self.needed[0] and len(learnt_N) != len(self.h):
            whole = self.h.new_zeros(len(learnt_N), self.h.shape[1])
            whole[learnt_N] = self.h
            return whole, self.w, self.b
        return self.h, self.w, self.b


def _cross_entropy_fake(z: Tensor, *rest: Any) -> Tensor:
    return z.new_empty((), dtype=torch.float32)


def _linear_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    rows: int, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if needed[0] else [0], dtype=kept),
        hidden.new_empty(weight.shape if needed[1] else [0], dtype=torch.float32),
        hidden.new_empty(bias.shape if bias is not None and needed[2] else [0], dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [None if part is None else part.dtype for part in inputs[:3]]
    ctx.needed = inputs[-1]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    found = (
        (kept * grad).to(dtype) if need and grad is not None else None
        for kept, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needed, strict=True)
    )
    return (*found, *[None] * 5)


torch.library.impl("finetune::cross_entropy_", "default")(cross_entropy_)
torch.library.impl("finetune::linear_cross_entropy", "default")(_linear_cross_entropy)
torch.library.register_fake("finetune::cross_entropy_")(_cross_entropy_fake)
torch.library.register_fake("finetune::linear_cross_entropy")(_linear_fake)
torch.library.register_autograd("finetune::linear_cross_entropy", _backward, setup_context=_save)
cpu_cross_entropy.register()

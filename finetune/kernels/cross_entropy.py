"""Cross entropy straight from hidden states, so that the logits of all positions never exist at once.

For a row of hidden states h and a head W, b the logits are `z = cap(scale * (W h + b))` with `cap(z) = c tanh(z / c)`
where the model caps them, and the loss is `logsumexp(z) - z[label]`. Rows are taken a chunk at a time; the gradient of
a chunk, `softmax(z) - onehot`, is folded into the gradient of the hidden states (and of the head, where it trains)
before its logits are dropped. This is the scheme of Cut Cross-Entropy (Wijmans et al. 2025, arXiv:2411.09009) and of
Liger Kernel's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989, section 3.2) in plain torch.

Shape suffixes: N learnt positions, C positions of one chunk, H hidden features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
CHUNK_BYTES = 32 * 2**20
"""Bytes that the float32 logits of a chunk may take."""
ROUND_ROWS = 128
"""Products run over a multiple of so many rows. How many positions are learnt differs from step to step, and oneDNN
compiles and keeps a kernel for every shape it meets: without the rounding memory grows with every step."""


def chunk_rows(vocab: int) -> int:
    """Positions whose float32 logits fit `CHUNK_BYTES`; at least 16, as products over fewer waste the machine."""
    return max(16, CHUNK_BYTES // (4 * vocab))


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
        float32 scalar.
    """
    keep = labels_N != IGNORE
    if not bool(keep.all()):
        hidden_NH, labels_N = hidden_NH[keep], labels_N[keep]
    rows = chunk or chunk_rows(weight_VH.shape[0])
    return _LinearCrossEntropy.apply(
        hidden_NH, weight_VH, bias_V, labels_N, scale, softcap, rows, torch.is_grad_enabled()
    )


def rounded(rows_CX: Tensor, chunk: int) -> Tensor:
    """The same rows with zero rows behind them, up to a multiple of `ROUND_ROWS` (of the chunk where that is less)."""
    missing = -len(rows_CX) % min(ROUND_ROWS, chunk)
    return torch.nn.functional.pad(rows_CX, (0, 0, 0, missing)) if missing else rows_CX


def logits_of(z_CV: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What a model makes of its head's output: `cap(scale * z)`, in the dtype of `z`."""
    if scale != 1.0:
        z_CV = z_CV * scale
    return z_CV if softcap is None else torch.tanh(z_CV / softcap) * softcap


def chunk_loss(
    z_CV: Tensor, labels_C: Tensor, scale: float, softcap: float | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of a chunk and, where asked for, its float32 gradient with respect to the head's output `z_CV`."""
    logits_CV = logits_of(z_CV, scale, softcap).float()
    log_norm_C = torch.logsumexp(logits_CV, dim=-1)
    picked_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    loss = (log_norm_C - picked_C).sum()
    if not with_grad:
        return loss, None
    cap_slope_CV = None if softcap is None else 1 - (logits_CV / softcap) ** 2
    grad_CV = torch.exp_(logits_CV.sub_(log_norm_C[:, None]))
    grad_CV.scatter_add_(1, labels_C[:, None], torch.full_like(picked_C, -1.0)[:, None])
    if cap_slope_CV is not None:
        grad_CV.mul_(cap_slope_CV)
    return loss, grad_CV.mul_(scale) if scale != 1.0 else grad_CV


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass and keeps only them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        scale: float,
        softcap: float | None,
        rows: int,
        grad_mode: bool,
    ) -> Tensor:
        dtype = hidden_NH.dtype
        need_h, need_w, need_b = (grad_mode and needed for needed in ctx.needs_input_grad[:3])
        # The gradient of a sum over one position is at most a row of W: float16 would flush its small parts to zero
        # before the loss scale reaches them.
        kept = torch.float32 if dtype == torch.float16 else dtype
        grad_NH = torch.empty_like(hidden_NH, dtype=kept) if need_h else None
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if need_w else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and need_b else None
        w_VH = weight_VH.to(dtype)
        b_V = None if bias_V is None else bias_V.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        for start in range(0, len(labels_N), rows):
            cut = slice(start, start + rows)
            h_CH = hidden_NH[cut]
            z_CV = torch.nn.functional.linear(rounded(h_CH, rows), w_VH, b_V)[: len(h_CH)]
            loss, grad_CV = chunk_loss(z_CV, labels_N[cut], scale, softcap, need_h or need_w or need_b)
            total += loss
            if grad_CV is None:
                continue
            if grad_NH is not None:
                grad_NH[cut] = (rounded(grad_CV.to(dtype), rows) @ w_VH)[: len(h_CH)].to(kept)
            if grad_VH is not None:
                grad_VH.addmm_(grad_CV.t(), h_CH.float())
            if grad_V is not None:
                grad_V += grad_CV.sum(0)
        ctx.save_for_backward(grad_NH, grad_VH, grad_V)
        ctx.dtypes = (dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if kept is None else (kept * grad).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None, None)

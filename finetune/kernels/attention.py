"""Softmax attention as one operator that keeps no scores: schema, fake implementation, autograd, reference.

`out = softmax(scale * query key^T + mask) value`, a query head sharing the key/value head that its group has. The
backward makes the probabilities again from the log-sum-exp of each query, as FlashAttention does (Dao et al. 2022,
arXiv:2205.14135, algorithm 4).

Shape suffixes: B rows, H query heads, G key/value heads, Q queries, K keys, S positions of either, D features of a
head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("finetune", "FRAGMENT")
_PROBLEM = "Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale"
_library.define(f"attention({_PROBLEM}) -> (Tensor, Tensor)")
_library.define(f"attention_backward(Tensor grad, {_PROBLEM}, Tensor out, Tensor log_sum) -> (Tensor, Tensor, Tensor)")


def attention(
    query_BHQD: Tensor,
    key_BGKD: Tensor,
    value_BGKD: Tensor,
    mask_B1QK: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The attended values as [B, Q, H, D], in the dtype of the query.

    Args:
        query_BHQD, key_BGKD, value_BGKD: one dtype; H a multiple of G. Any strides, so views of projections do.
        mask_B1QK: bool, true where a query sees a key; a query that sees nothing gets zeros.
        causal: without a mask, a query sees the keys up to its own position; needs as many keys as queries.
        scale: of the scores; None for 1 / sqrt(D).

    Raises:
        ValueError: where the shapes do not fit.
    """
    heads, groups = query_BHQD.shape[1], key_BGKD.shape[1]
    if heads % groups or (causal and mask_B1QK is None and query_BHQD.shape[2] != key_BGKD.shape[2]):
        raise ValueError(f"attention of {tuple(query_BHQD.shape)} over {tuple(key_BGKD.shape)}, causal={causal}")
    factor = query_BHQD.shape[-1] ** -0.5 if scale is None else scale
    causal = causal and mask_B1QK is None
    out: Tensor = torch.ops.finetune.attention(query_BHQD, key_BGKD, value_BGKD, mask_B1QK, causal, factor)[0]
    return out


def _scores(query_BQD: Tensor, key_BKD: Tensor, mask_B1QK: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Float32 scores of one head, minus infinity where a query does not see a key."""
    scores_BQK = query_BQD.float() @ key_BKD.float().mT * scale
    if mask_B1QK is not None:
        return scores_BQK.masked_fill(~mask_B1QK[:, 0], -torch.inf)
    if causal:
        seen_QK = torch.ones(scores_BQK.shape[1:], dtype=torch.bool, device=scores_BQK.device).tril()
        return scores_BQK.masked_fill(~seen_QK, -torch.inf)
    return scores_BQK


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The operator in plain torch, a head at a time, in float32."""
    B, H, Q, D = query.shape
    out, log_sum = query.new_empty(B, Q, H, D), query.new_empty(B, H, Q, dtype=torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        for h in range(H):
            g = h * key.shape[1] // H
            scores_BQK = _scores(query[:, h], key[:, g], mask, causal, scale)
            total_BQ = torch.logsumexp(scores_BQK, dim=-1)
            log_sum[:, h] = total_BQ.masked_fill(total_BQ == -torch.inf, torch.inf)
            out[:, :, h] = (torch.exp(scores_BQK - log_sum[:, h, :, None]) @ value[:, g].float()).to(out.dtype)
    return out, log_sum


def reference_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in plain torch, a head at a time, summed in float32."""
    H, G = query.shape[1], key.shape[1]
    grad_query = empty_heads(query)
    grad_key, grad_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
    with torch.autocast(query.device.type, enabled=False):
        for h in range(H):
            g = h * G // H
            grad_BQD, delta_BQ = grad[:, :, h].float(), (grad[:, :, h].float() * out[:, :, h].float()).sum(-1)
            scores_BQK = _scores(query[:, h], key[:, g], mask, causal, scale)
            prob_BQK = torch.exp(scores_BQK - log_sum[:, h, :, None])
            slope_BQK = prob_BQK * (grad_BQD @ value[:, g].float().mT - delta_BQ[..., None]) * scale
            grad_query[:, h] = (slope_BQK @ key[:, g].float()).to(query.dtype)
            grad_key[:, g] += slope_BQK.mT @ query[:, h].float()
            grad_value[:, g] += prob_BQK.mT @ grad_BQD
    return grad_query, empty_heads(key).copy_(grad_key), empty_heads(value).copy_(grad_value)


def empty_heads(like_BHSD: Tensor) -> Tensor:
    """An uninitialised [B, H, S, D] that lies in memory as [B, S, H, D], as projections hand heads out."""
    B, H, S, D = like_BHSD.shape
    return like_BHSD.new_empty(B, S, H, D).transpose(1, 2)


@torch.library.register_fake("finetune::attention")
def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    B, H, Q, D = query.shape
    return query.new_empty(B, Q, H, D), query.new_empty(B, H, Q, dtype=torch.float32)


@torch.library.register_fake("finetune::attention_backward")
def _attention_backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(query), empty_heads(key), empty_heads(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, causal, scale = inputs
    ctx.save_for_backward(query, key, value, mask, *output)
    ctx.settings = (causal, scale)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mask, out, log_sum = ctx.saved_tensors
    problem = (query, key, value, mask, *ctx.settings)
    return (*torch.ops.finetune.attention_backward(grad, *problem, out, log_sum), None, None, None)


torch.library.impl("finetune::attention", "default")(reference)
torch.library.impl("finetune::attention_backward", "default")(reference_backward)
torch.library.register_autograd("finetune::attention", _backward, setup_context=_save)

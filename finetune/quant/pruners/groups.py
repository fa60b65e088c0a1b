"""Which groups of columns of a matrix to remove, and what the others become: the optimal brain surgeon for groups.

A group is a channel of a feed-forward (one column) or the heads that share a key and a value (several). With H the
second moment of the inputs, removing the columns S costs tr(W_S ([H^-1]_SS)^-1 W_S^T) once the remaining columns are
fitted anew, and the fit is W_K + W_S H_SK H_KK^-1 (Frantar & Alistarh 2022, arXiv:2208.11580, for one weight; Kurtic,
Frantar & Alistarh 2023, arXiv:2302.04089, "ZipLM", section 3, for groups). Groups go one after the other, the cheapest
first, each seen with those before it gone: two channels that say the same are cheap alone, and not together.

Shape suffixes: O out features, I in features, U groups, S columns of a group, K columns kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.quant.rounders.gptq import STEPS

ROUNDS = 64
"""Products with the whole of H^-1 at most: more groups than that go several at a time, chosen one after the other from
those that are cheap."""
NEAR = 4
"""So many candidates for each of those."""


def factor(gram_II: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """The Cholesky factor of H with some of its mean diagonal added to its diagonal, and the share that it needed.

    Args:
        damping: that share; ten and a hundred times it where H is singular, else the factor is None.
    """
    mean, share = gram_II.diagonal().mean(), damping
    for step in STEPS:
        share = damping * step
        factor_II = gram_II.clone()
        factor_II.diagonal().add_(share * mean)
        failed = torch.empty((), dtype=torch.int32, device=gram_II.device)
        torch.linalg.cholesky_ex(factor_II, out=(factor_II, failed))
        if not failed and bool(factor_II.sum().isfinite()):
            return factor_II, share
    return None, share


def columns_of(groups_U: Tensor, size: int) -> Tensor:
    """The columns of some groups, in order."""
    return (groups_U.unsqueeze(1) * size + torch.arange(size, device=groups_U.device)).flatten()


def cheapest(w_OI: Tensor, inverse_II: Tensor, size: int, count: int, rounds: int = ROUNDS) -> Tensor:
    """So many groups whose removal costs least, found greedily, in the order in which they go.

    Args:
        w_OI: float32; left as it is.
        inverse_II: the inverse of H; used up.
        size: columns of a group.
    """
    w_OI = w_OI.clone()
    gone: list[Tensor] = []
    here = torch.ones(w_OI.shape[1] // size, dtype=torch.bool, device=w_OI.device)
    at_once = -(-count // rounds)
    while (left := count - sum(map(len, gone))) > 0:
        scores_U = torch.where(here, _costs(w_OI, inverse_II, size), torch.inf)
        take = min(at_once, left)
        if take == 1:
            chosen_U = scores_U.argmin().unsqueeze(0)
        else:
            near_U = scores_U.topk(min(NEAR * take, int(here.sum())), largest=False).indices.sort().values
            near = columns_of(near_U, size)
            chosen_U = near_U[cheapest(w_OI[:, near], inverse_II[near][:, near], size, take, rounds=take)]
        _remove(w_OI, inverse_II, columns_of(chosen_U, size))
        here[chosen_U] = False
        gone.append(chosen_U)
    return torch.cat(gone)


def _costs(w_OI: Tensor, inverse_II: Tensor, size: int) -> Tensor:
    """What removing each group costs, the others fitted anew; 0 for one that is removed."""
    if size == 1:
        return w_OI.square().sum(0) / inverse_II.diagonal()
    units = w_OI.shape[1] // size
    blocks_USS = inverse_II.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    w_USO = w_OI.T.reshape(units, size, -1)
    return (w_USO * torch.linalg.solve(blocks_USS, w_USO)).sum((1, 2))


def _remove(w_OI: Tensor, inverse_II: Tensor, columns: Tensor) -> None:
    """Take columns out, in place: the others fitted anew, H^-1 that of what is left; theirs become 0 and 1."""
    solved = torch.linalg.solve(inverse_II[columns][:, columns], inverse_II[columns])
    w_OI.addmm_(w_OI[:, columns], solved, alpha=-1)
    inverse_II.addmm_(inverse_II[:, columns], solved, alpha=-1)
    w_OI[:, columns] = 0
    inverse_II[columns] = 0
    inverse_II[:, columns] = 0
    inverse_II[columns, columns] = 1


def refit(w_OI: Tensor, gram_II: Tensor, kept_K: Tensor, damping: float = 0.0) -> Tensor:
    """The columns that are kept, fitted so that they do best what all of them did, float32 [O, K].

    Args:
        gram_II: H; `kept_K` are its columns to keep.
        damping: share of its mean diagonal that is added to its diagonal.

    Raises:
        torch.linalg.LinAlgError: where it is singular.
    """
    gone = torch.ones(w_OI.shape[1], dtype=torch.bool, device=w_OI.device)
    gone[kept_K] = False
    hessian_KK = gram_II[kept_K[:, None], kept_K]
    hessian_KK.diagonal().add_(damping * gram_II.diagonal().mean())
    factor_KK = torch.linalg.cholesky(hessian_KK)
    towards_KO = gram_II[kept_K[:, None], gone.nonzero().flatten()] @ w_OI[:, gone].T
    return w_OI[:, kept_K] + torch.cholesky_solve(towards_KO, factor_KK).T


def alone(w_OI: Tensor, gram_II: Tensor, size: int) -> Tensor:
    """What removing each group costs where nothing is fitted anew: tr(W_S H_SS W_S^T), by group."""
    if size == 1:
        return w_OI.square().sum(0) * gram_II.diagonal()
    units = w_OI.shape[1] // size
    blocks_USS = gram_II.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    w_USO = w_OI.T.reshape(units, size, -1)
    return (w_USO * (blocks_USS @ w_USO)).sum((1, 2))

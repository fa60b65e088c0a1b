"""Choosing groups of columns and fitting the others, against least squares in float64 and all choices there are."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from finetune.quant.pruners import groups
from finetune.quant.pruners.heads import HeadsConfig
from finetune.quant.pruners.units import choose


def layer(rows: int, columns: int, samples: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs, float64."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    x_NI = torch.randn(samples, columns, generator=draw, dtype=torch.float64) @ (mix + 2 * torch.eye(columns))
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64), x_NI


def best_loss(w_OI: Tensor, x_NI: Tensor, gone: list[int]) -> float:
    """Squared error of the output once all other columns are fitted, by least squares."""
    kept = [column for column in range(w_OI.shape[1]) if column not in gone]
    wanted_NO = x_NI @ w_OI.T
    fitted_KO = torch.linalg.lstsq(x_NI[:, kept], wanted_NO).solution
    return float((wanted_NO - x_NI[:, kept] @ fitted_KO).square().sum())


def greedy(w_OI: Tensor, x_NI: Tensor, size: int, count: int, rounds: int = groups.ROUNDS) -> list[int]:
    inverse_II = torch.linalg.inv(x_NI.T @ x_NI)
    return groups.cheapest(w_OI, inverse_II, size, count, rounds).tolist()


@pytest.mark.parametrize("size", [1, 3])
def test_predicted_costs_are_those_of_least_squares(size: int) -> None:
    w_OI, x_NI = layer(5, 12)
    costs_U = groups._costs(w_OI, torch.linalg.inv(x_NI.T @ x_NI), size)
    for unit, cost in enumerate(costs_U.tolist()):
        gone = list(range(unit * size, unit * size + size))
        assert cost == pytest.approx(best_loss(w_OI, x_NI, gone), rel=1e-9)


def test_the_choice_is_near_the_best_of_all_choices() -> None:
    ratios, naive = [], []
    for seed in range(40):
        w_OI, x_NI = layer(4, 8, samples=64, seed=seed)
        best = min(best_loss(w_OI, x_NI, list(columns)) for columns in combinations(range(8), 3))
        ratios.append(best_loss(w_OI, x_NI, greedy(w_OI, x_NI, 1, 3)) / best)
        cheap = groups.alone(w_OI, x_NI.T @ x_NI, 1).topk(3, largest=False).indices.tolist()
        naive.append(best_loss(w_OI, x_NI, cheap) / best)
    mean, other = (float(torch.tensor(each).log().mean().exp()) for each in (ratios, naive))
    exact = sum(ratio < 1 + 1e-9 for ratio in ratios)
    assert min(ratios) >= 1 - 1e-9
    assert mean < 1.2 and exact >= 20 and other > 1.3 * mean, (mean, exact, other)


@pytest.mark.parametrize("size", [1, 2])
def test_groups_that_go_are_seen_by_those_after_them(size: int) -> None:
    """Two that say the same are cheap, each of them: the second is no longer once the first is gone."""
    w_OI, x_NI = layer(4, 12)
    x_NI[:, size : 2 * size] = x_NI[:, :size] + 1e-4 * torch.randn(len(x_NI), size, dtype=torch.float64)
    for rounds in (groups.ROUNDS, 1):
        gone = greedy(w_OI, x_NI, size, 3, rounds)
        assert len({0, 1} & set(gone)) == 1 and len(set(gone)) == 3, rounds


def test_several_at_a_time_are_as_good_as_one_by_one() -> None:
    w_OI, x_NI = layer(16, 96, samples=600)
    one, several = greedy(w_OI, x_NI, 1, 32), greedy(w_OI, x_NI, 1, 32, rounds=8)
    assert len(set(several)) == 32
    assert best_loss(w_OI, x_NI, several) <= 1.02 * best_loss(w_OI, x_NI, one)


def test_the_fit_is_least_squares_and_leaves_what_costs_nothing() -> None:
    w_OI, x_NI = layer(5, 12)
    kept_K = torch.tensor([0, 2, 3, 7, 8, 11])
    fitted_OK = groups.refit(w_OI, x_NI.T @ x_NI, kept_K)
    wanted = torch.linalg.lstsq(x_NI[:, kept_K], x_NI @ w_OI.T).solution.T
    torch.testing.assert_close(fitted_OK, wanted, atol=1e-9, rtol=1e-9)
    silent_OI = w_OI.clone()
    silent_OI[:, [1, 4, 5, 6, 9, 10]] = 0
    assert torch.equal(groups.refit(silent_OI, x_NI.T @ x_NI, kept_K), w_OI[:, kept_K])


def test_a_bias_takes_part_in_the_fit() -> None:
    w_OI, x_NI = layer(5, 12)
    x_NI = x_NI + 3
    ones_NI = torch.cat([x_NI, torch.ones(len(x_NI), 1, dtype=torch.float64)], dim=1)
    settings = HeadsConfig(damping=1e-9)
    found = choose(settings, w_OI.float(), (ones_NI.T @ ones_NI).float(), w_OI.square().sum(0).float(), 6)
    kept = [*found.kept_K.tolist(), 12]
    solution = torch.linalg.lstsq(ones_NI[:, kept], x_NI @ w_OI.T).solution
    assert found.shift_O is not None
    torch.testing.assert_close(found.shift_O.double(), solution[-1], atol=1e-2, rtol=1e-2)
    left = x_NI @ w_OI.T - ones_NI[:, kept] @ solution
    assert found.error == pytest.approx(float(left.square().sum() / (x_NI @ w_OI.T).square().sum()), rel=1e-2)
    assert found.error < choose(HeadsConfig(refit=False), w_OI.float(), (ones_NI.T @ ones_NI).float(),
                                w_OI.square().sum(0).float(), 6).error  # fmt: skip


def test_inputs_that_were_never_there_go_first() -> None:
    w_OI, x_NI = layer(5, 12)
    w_OI[:, [3, 8]] *= 100
    x_NI[:, [3, 8]] = 0
    gram_II, sizes_U = (x_NI.T @ x_NI).float(), w_OI.square().sum(0).float()
    found = choose(HeadsConfig(), w_OI.float(), gram_II, sizes_U, 10)
    assert not {3, 8} & set(found.kept_K.tolist())
    assert found.error < 1e-9


def test_what_saw_no_inputs_is_chosen_by_size() -> None:
    w_OI, _ = layer(5, 12)
    sizes_U = torch.arange(6.0)
    found = choose(HeadsConfig(), w_OI.float(), None, sizes_U, 4)
    assert found.kept_K.tolist() == [2, 3, 4, 5] and "saw no inputs" in found.note
    assert torch.equal(found.weight_OI, w_OI[:, 4:].float())


def test_a_singular_second_moment_is_told() -> None:
    w_OI, _ = layer(5, 12)
    gram_II = torch.full((12, 12), float("nan"))
    found = choose(HeadsConfig(), w_OI.float(), gram_II, torch.arange(12.0), 6)
    assert "H is singular" in found.note and found.kept_K.tolist() == list(range(6, 12))

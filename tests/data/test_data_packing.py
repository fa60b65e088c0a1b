"""Plans: every row once an epoch, sequences within their length, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.batching import batch_plan, collate, eval_batches, packed_mask
from finetune.data.packing import pack
from finetune.data.rows import IGNORE, Row, TokenRows

LENGTHS = st.lists(st.integers(1, 32), max_size=60)


def rows_of(lengths: list[int]) -> TokenRows:
    rows, place = [], 1
    for length in lengths:
        ids = np.arange(place, place + length, dtype=np.int32)
        labels = ids.copy()
        labels[0] = IGNORE
        rows.append(Row(ids, labels))
        place += length
    return TokenRows.of(rows)


@given(LENGTHS)
def test_packing_places_every_row_once_within_the_length(lengths: list[int]) -> None:
    bins = pack(lengths, 32)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= 32 for bin_ in bins)


def best_fit_decreasing(lengths: list[int], size: int) -> int:
    """The textbook algorithm, bin by bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(size - length)
    return len(rooms)


@given(LENGTHS)
def test_packing_is_best_fit_decreasing(lengths: list[int]) -> None:
    assert len(pack(lengths, 32)) == best_fit_decreasing(lengths, 32)


def test_a_row_longer_than_a_sequence_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="row 1 has 9 tokens, more than 8"):
        pack([3, 9], 8)


@settings(max_examples=60)
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 5),
    packing=st.booleans(),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_a_plan_holds_every_row_once(lengths: list[int], batch_size: int, packing: bool, seed: int, epoch: int) -> None:
    rows = rows_of(lengths)
    plan = batch_plan(rows, batch_size=batch_size, packing=packing, max_length=32, seed=seed, epoch=epoch)
    assert sorted(i for micro in plan for sequence in micro for i in sequence) == list(range(len(lengths)))
    assert all(len(micro) == batch_size for micro in plan[:-1])
    assert plan == batch_plan(rows, batch_size=batch_size, packing=packing, max_length=32, seed=seed, epoch=epoch)
    for micro in plan:
        assert all(sum(lengths[i] for i in sequence) <= 32 for sequence in micro)
        batch = collate(rows, micro, pad_id=0)
        assert batch.target_tokens() == sum(lengths[i] - 1 for sequence in micro for i in sequence)


@pytest.mark.parametrize("packing", [False, True])
def test_seed_and_epoch_change_the_order_and_the_neighbours(packing: bool) -> None:
    rows = rows_of([1 + i % 7 for i in range(50)])

    def plan(seed: int, epoch: int) -> list[list[list[int]]]:
        return batch_plan(rows, batch_size=2, packing=packing, max_length=16, seed=seed, epoch=epoch)

    assert plan(0, 0) != plan(0, 1) != plan(1, 0)
    if packing:
        neighbours = [{frozenset(s) for m in plan(0, e) for s in m} for e in (0, 1)]
        assert neighbours[0] != neighbours[1]


def test_an_unpacked_batch_is_padded_right_with_a_mask() -> None:
    batch = collate(rows_of([3, 5]), [[0], [1]], pad_id=99)
    assert batch.input_ids_BS.tolist() == [[1, 2, 3, 99, 99], [4, 5, 6, 7, 8]]
    assert batch.labels_BS.tolist() == [[IGNORE, 2, 3, IGNORE, IGNORE], [IGNORE, 5, 6, 7, 8]]
    assert batch.attention_mask_BS is not None
    assert batch.attention_mask_BS.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.target_tokens() == 6


def test_a_packed_batch_restarts_positions_at_each_row_and_at_the_padding() -> None:
    batch = collate(rows_of([3, 2, 4]), [[0, 1], [2]], pad_id=99)
    assert batch.attention_mask_BS is None and "attention_mask" not in batch.model_inputs()
    assert batch.input_ids_BS.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 99]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.shifted_labels_BS().tolist() == [[2, 3, IGNORE, 5, IGNORE], [7, 8, 9, IGNORE, IGNORE]]
    assert batch.target_tokens() == 6


def test_the_first_token_of_a_row_is_never_a_target_of_the_row_before() -> None:
    rows = rows_of([2, 3])
    rows.labels[:] = rows.input_ids
    batch = collate(rows, [[0, 1]], pad_id=99)
    assert batch.shifted_labels_BS().tolist() == [[2, IGNORE, 4, 5, IGNORE]]
    assert batch.target_tokens() == 3


def test_a_packed_mask_keeps_rows_apart_and_causal() -> None:
    import torch

    batch = collate(rows_of([2, 2]), [[0, 1]], pad_id=99)
    mask = packed_mask(batch, torch.float32)
    assert mask.shape == (1, 1, 4, 4) and mask.dtype == torch.float32
    assert (mask[0, 0] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask.min() == torch.finfo(torch.float32).min


def test_evaluation_sees_every_row_longest_first() -> None:
    rows = rows_of([2, 7, 3, 7, 1])
    batches = list(eval_batches(rows, 2, pad_id=0))
    assert [batch.input_ids_BS.shape for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    assert [batch.attention_mask_BS.sum(1).tolist() for batch in batches] == [[7, 7], [3, 2], [1]]
    assert sum(batch.target_tokens() for batch in batches) == sum(length - 1 for length in rows.lengths())
    assert all(batch.attention_mask_BS is not None for batch in batches)


def test_a_batch_rounded_up_computes_the_same_and_stays_within_the_model() -> None:
    """Positions at the padding never exceed those of real tokens, and no label stands there."""
    rows = rows_of([5, 3, 7])
    plain, wide = collate(rows, [[0], [1], [2]], pad_id=99), collate(rows, [[0], [1], [2]], pad_id=99, multiple=16)
    assert wide.input_ids_BS.shape == (3, 16) and plain.input_ids_BS.shape == (3, 7)
    assert torch.equal(wide.input_ids_BS[:, :7], plain.input_ids_BS) and wide.position_ids_BS.max() == 6
    assert wide.target_tokens() == plain.target_tokens()
    assert wide.attention_mask_BS is not None and not wide.attention_mask_BS[:, 7:].any()
    packed = collate(rows, [[0, 1, 2]], pad_id=99, multiple=16)
    assert packed.position_ids_BS[0].tolist() == [*range(5), *range(3), *range(7), 0]

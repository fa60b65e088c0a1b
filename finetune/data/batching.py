"""From rows to batches: the order of an epoch, padding, packing.

Shape suffixes: B rows of the batch, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from finetune.data.packing import pack
from finetune.data.rows import IGNORE, Batch, PairBatch, TokenRows

Sequences = list[list[int]]
"""A micro-batch: sequences, each a list of row indices, one unless packed."""


def batch_plan(
    rows: TokenRows, *, batch_size: int, packing: bool, max_length: int, seed: int, epoch: int
) -> list[Sequences]:
    """The micro-batches of an epoch; every row occurs in exactly one of them. Depends on nothing but the arguments.

    Args:
        rows: to learn from.
        batch_size: sequences in a micro-batch; the last one may have fewer.
        packing: fill sequences with several rows.
        max_length: tokens of a packed sequence.
        seed, epoch: of the shuffle.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = generator.permutation(len(rows))
    if packing:
        lengths = rows.lengths()[order]
        longest = max(max_length, int(lengths.max(initial=1)))
        sequences = [[int(order[i]) for i in bin_] for bin_ in pack(lengths, longest)]
        sequences = [sequences[i] for i in generator.permutation(len(sequences))]
    else:
        sequences = [[int(i)] for i in order]
    return [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]


LENGTH_STEP = 16
"""Batches that are run by the hundred are padded to a multiple of so many positions: libraries compile and keep a
kernel for every shape they meet, and on a CPU those of a few hundred lengths take more memory than a small model."""


def collate(rows: TokenRows, micro_batch: Sequence[Sequence[int]], pad_id: int, multiple: int = 1) -> Batch:
    """The batch of a micro-batch, padded on the right to its longest sequence, and on to a multiple of `multiple`.

    One row a sequence: an attention mask, positions that count through (at the padding they stay at the last one that
    a real token has, so that none exceeds what the model was made for). Several rows in some sequence: no mask;
    positions restart at each row and once more at the padding, by which transformers keeps the rows apart.

    Args:
        rows: that the indices point into.
        micro_batch: sequences of row indices.
        pad_id: any token; its label is IGNORE and no row attends to it.
        multiple: `LENGTH_STEP` where many batches are run, so that their shapes repeat.
    """
    if rows.sources is not None:
        return _collate_pairs(rows, [index for sequence in micro_batch for index in sequence], pad_id, multiple)
    packed = any(len(sequence) > 1 for sequence in micro_batch)
    assert not packed or rows.targets is None, "rows with a target are never packed"
    lengths = [sum(len(rows[i].input_ids) for i in sequence) for sequence in micro_batch]
    longest = max(lengths)
    shape = (len(micro_batch), -(-longest // multiple) * multiple)
    ids_BS, labels_BS = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    positions_BS = np.tile(np.minimum(np.arange(shape[1]), longest - 1), (shape[0], 1))
    types_BS = None if rows.token_types is None else np.zeros(shape, np.int64)
    for b, sequence in enumerate(micro_batch):
        place = 0
        for index in sequence:
            row = rows[index]
            stop = place + len(row.input_ids)
            ids_BS[b, place:stop] = row.input_ids
            labels_BS[b, place:stop] = row.labels
            if types_BS is not None:
                types_BS[b, place:stop] = row.token_types
            if packed:
                positions_BS[b, place:stop] = np.arange(stop - place)
            place = stop
        if packed:
            positions_BS[b, place:] = np.arange(shape[1] - place)
    real_BS = np.arange(shape[1])[None] < np.array(lengths)[:, None]
    mask_BS = None if packed else torch.from_numpy(real_BS.astype(np.int64))
    targets_B = None
    if rows.targets is not None:
        targets_B = torch.from_numpy(rows.targets[[index for sequence in micro_batch for index in sequence]])
    return Batch(
        torch.from_numpy(ids_BS),
        torch.from_numpy(labels_BS),
        torch.from_numpy(positions_BS),
        mask_BS,
        targets_B,
        None if types_BS is None else torch.from_numpy(types_BS),
    )


def _collate_pairs(rows: TokenRows, indices: Sequence[int], pad_id: int, multiple: int) -> PairBatch:
    """Rows of an encoder and its decoder: what is read and what is written, each padded on the right by itself."""
    chosen = [rows[index] for index in indices]
    read = [row.input_ids[: row.source] for row in chosen]
    written = [row.labels[row.source :] for row in chosen]
    read_S, written_T = (-(-max(map(len, side)) // multiple) * multiple for side in (read, written))
    ids_BS, mask_BS = np.full((len(chosen), read_S), pad_id, np.int64), np.zeros((len(chosen), read_S), np.int64)
    labels_BT = np.full((len(chosen), written_T), IGNORE, np.int64)
    for b, (source, target) in enumerate(zip(read, written, strict=True)):
        ids_BS[b, : len(source)], mask_BS[b, : len(source)] = source, 1
        labels_BT[b, : len(target)] = target
    positions_BT = np.tile(np.arange(written_T), (len(chosen), 1))
    return PairBatch(*map(torch.from_numpy, (ids_BS, labels_BT, positions_BT, mask_BS)))


def eval_batches(rows: TokenRows, batch_size: int, pad_id: int) -> Iterator[Batch]:
    """All rows, longest first (so that what does not fit in memory shows at once), unpacked."""
    order = np.argsort(-rows.lengths(), kind="stable").tolist()
    for start in range(0, len(order), batch_size):
        yield collate(rows, [[i] for i in order[start : start + batch_size]], pad_id, LENGTH_STEP)


def packed_mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """The attention mask of a packed batch, for models that do not tell rows apart by their positions (OPT).

    0 where a position may look (itself and what precedes it in its row), the dtype's minimum elsewhere. A boolean mask
    would leak under eager attention, and a sliding window is lost under any 4-D mask: use it only where positions
    alone fail.

    Args:
        batch: with positions that restart at each row.
        dtype: of the model's activations.

    Returns:
        [B, 1, S, S] in `dtype`.
    """
    row_BS = (batch.position_ids_BS == 0).cumsum(dim=1)
    same_BSS = row_BS[:, :, None] == row_BS[:, None, :]
    length = row_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=row_BS.device).tril()
    mask_BSS = torch.zeros(same_BSS.shape, dtype=dtype, device=row_BS.device)
    return mask_BSS.masked_fill(~(same_BSS & causal_SS), torch.finfo(dtype).min)[:, None]

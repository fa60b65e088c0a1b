"""Which rows share a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: the longest row first, each into the fullest sequence that still has room.

    (Johnson, "Near-optimal bin packing algorithms", 1973; used for language models by Ding et al., arXiv:2404.10830.)
    Among rows of equal length the order given decides, so a shuffled input gives other neighbours.

    Args:
        lengths: tokens of each row, at most `max_length`.
        max_length: tokens of a sequence.

    Returns:
        sequences as lists of row indices; every index once.

    Raises:
        ValueError: for a row longer than a sequence.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and lengths.max() > max_length:
        raise ValueError(f"row {int(lengths.argmax())} has {int(lengths.max())} tokens, more than {max_length}")
    bins: list[list[int]] = []
    room_to_bins: list[list[int]] = [[] for _ in range(max_length + 1)]
    # Bit r is set where a sequence has room for r more tokens: the best fit is one shift and one lowest bit away.
    open_rooms = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = room_to_bins[room].pop()
            if not room_to_bins[room]:
                open_rooms &= ~(1 << room)
        else:
            room, chosen = max_length, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = room - length
        if left:
            room_to_bins[left].append(chosen)
            open_rooms |= 1 << left
    return bins

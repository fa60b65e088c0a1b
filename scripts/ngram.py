"""A 5-gram token model with back-off: the baseline that the embedded base has to beat.

Interpolated modified Kneser-Ney (Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for
Language Modeling", section 3). Every order's probabilities sum to one over the vocabulary, the lowest order
backing off to the uniform distribution, so that bits per byte compare fairly with a neural model's.

    python scripts/ngram.py            # trains and scores on the text and tokenizer of the embedded base
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass

import numpy as np

Keys = np.ndarray  # uint64, one n-gram each, the oldest token in the highest digits of base `vocab_size`


@dataclass(frozen=True)
class Order:
    """One order's table: discounted probability of each n-gram, and what its context hands down to the order below."""

    grams: Keys
    probability: np.ndarray
    contexts: Keys
    backoff: np.ndarray


class NGram:
    """An n-gram model over token ids, estimated from one stream by interpolated modified Kneser-Ney."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int = 5) -> None:
        if vocab_size**order >= 2**64:
            raise ValueError(f"{order}-grams over {vocab_size} tokens do not fit into 64-bit keys")
        self.vocab_size, self.order = vocab_size, order
        grams, counts = np.unique(self._keys(tokens, order), return_counts=True)
        tables = [self._table(grams, counts)]
        for length in range(order - 1, 0, -1):
            # Lower orders count in how many different contexts an n-gram was seen, not how often.
            grams, counts = np.unique(grams % np.uint64(vocab_size**length), return_counts=True)
            tables.append(self._table(grams, counts))
        self.tables = tables[::-1]

    def _keys(self, tokens: np.ndarray, length: int) -> Keys:
        """Return the key of every n-gram of `length` tokens in a stream."""
        keys = np.zeros(max(0, len(tokens) - length + 1), dtype=np.uint64)
        for offset in range(length):
            keys = keys * np.uint64(self.vocab_size) + tokens[offset : offset + len(keys)].astype(np.uint64)
        return keys

    def _table(self, grams: Keys, counts: np.ndarray) -> Order:
        """Return the discounted table of one order from its n-grams (sorted) and their counts."""
        n1, n2, n3, n4 = (max(int((counts == count).sum()), 1) for count in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        raw = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        # Tiny streams have odd counts of counts; a discount must leave something to the order below, or an unseen
        # token would be impossible, and cannot be more than the count.
        discount = np.clip(raw, 0.1, [0.1, 1.0, 2.0, 3.0])[np.minimum(counts, 3)]
        contexts, first = np.unique(grams // np.uint64(self.vocab_size), return_index=True)
        total = np.add.reduceat(counts, first).astype(np.float64)
        backoff = np.add.reduceat(discount, first) / total
        sizes = np.diff(np.append(first, len(grams)))
        return Order(grams, (counts - discount) / np.repeat(total, sizes), contexts, backoff)

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Return the probability of every token but the first, given up to `order - 1` tokens before it."""
        probability = np.full(len(tokens) - 1, 1.0 / self.vocab_size)
        for length, table in enumerate(self.tables, start=1):
            # The first tokens of the stream have too short a past for the higher orders and keep the lower one's.
            start = max(length - 2, 0)
            keys = self._keys(tokens, length)[1 if length == 1 else 0 :]
            below = probability[start:]
            context = keys // np.uint64(self.vocab_size)
            weight = _lookup(table.contexts, table.backoff, context, missing=1.0)
            probability[start:] = _lookup(table.grams, table.probability, keys, missing=0.0) + weight * below
        return probability

    def bits(self, tokens: np.ndarray) -> float:
        """Return the total code length, in bits, of every token but the first."""
        return float(-np.log2(self.probabilities(tokens)).sum())


def _lookup(keys: Keys, values: np.ndarray, wanted: Keys, missing: float) -> np.ndarray:
    """Return `values` at the places of `wanted` in the sorted `keys`, and `missing` where it is not there."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], missing)


def main() -> None:
    """Score the 5-gram on the held-out text of the embedded base and print one JSON line."""
    import pretrain_tiny  # beside this file, which is on the path when run as a script

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--order", type=int, default=5, help="longest n-gram (default 5)")
    order = parser.parse_args().order
    corpus = pretrain_tiny.tokenize_corpus(pretrain_tiny.documents(), pretrain_tiny.load_tokenizer())
    bits = NGram(corpus.train, pretrain_tiny.VOCAB_SIZE, order).bits(corpus.held_out)
    tokens = len(corpus.held_out) - 1
    report = {
        "order": order,
        "tokens": tokens,
        "bits_per_byte": round(bits / corpus.held_out_bytes, 4),
        "loss_nats_per_token": round(bits * math.log(2) / tokens, 4),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Keyed hashes, keyed permutations and quota schedules behind the order of the stream.

Everything here is a pure, vectorized function of its arguments, without generator state, so a run
can resume at any point on any number of ranks.
"""

from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment
_ROUNDS = 4  # pairs of half rounds; three pass the tests, plus one as a safety margin
_SCHEDULE_LENGTH = 10_000


def scramble(x: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer (Steele et al. 2014) to a uint64 array, in place."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers to uint64, elementwise with broadcasting; always at least one-dimensional."""
    state = np.full(1, _GOLDEN)
    for word in words:
        if isinstance(word, np.ndarray):
            value = word.astype(np.uint64)
        else:  # a Python integer of any size or sign
            value = np.full(1, int(word) & _MASK, dtype=np.uint64)
        state = scramble((state ^ value) + _GOLDEN)
    return state


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Map `index` through the permutation of 0..size-1 that `key` selects.

    A Feistel network over the next power of two; results outside the range are mapped again until
    they fall inside (cycle walking, Black and Rogaway 2002), fewer than two passes on average.
    O(1) memory for any `size`.

    Args:
        index: (n,) integers in 0..size-1.
        size: number of permuted elements.
        key: (n,) or (1,) uint64; equal keys select the same permutation.
    Returns:
        (n,) int64 in 0..size-1.
    """
    x = np.asarray(index).astype(np.uint64)
    if size <= 1 or x.size == 0:
        return np.zeros(x.shape, dtype=np.int64)
    key = np.broadcast_to(key, x.shape)
    # A few spare bits keep the halves of a tiny range wide enough to mix.
    bits = max(6, (size - 1).bit_length())
    pending = np.arange(x.size)
    while pending.size:
        x[pending] = _feistel(x[pending], bits, key[pending])
        pending = pending[x[pending] >= np.uint64(size)]
    return x.astype(np.int64)


def _feistel(x: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    """Apply a bijection of 0..2**bits-1 once; its halves may differ by one bit."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = x >> low_bits, x & low_mask
    for _ in range(_ROUNDS):
        key = key + _GOLDEN  # another round function each time
        high ^= scramble(key ^ low) & high_mask
        key = key + _GOLDEN
        low ^= scramble(key ^ high) & low_mask
    return (high << low_bits) | low


class QuotaSchedule:
    """Schedule that assigns each draw to a source, with exact quotas spread evenly.

    One period of 10,000 draws is computed once, with each source's draws evenly spaced, so the
    count of any source among the first `i` draws is a division and a lookup. Every positive weight
    gets at least one draw per period.
    """

    def __init__(self, weights: Sequence[float]):
        share = np.asarray(weights, dtype=np.float64)
        share = share / share.sum()
        counts = np.where(share > 0, np.maximum(1, np.floor(share * _SCHEDULE_LENGTH)), 0)
        counts = counts.astype(np.int64)
        while counts.sum() < _SCHEDULE_LENGTH:  # largest remainder
            counts[np.argmax(share * _SCHEDULE_LENGTH - counts)] += 1
        while counts.sum() > _SCHEDULE_LENGTH:  # only if tiny weights were raised to one draw
            counts[np.argmax(counts)] -= 1
        source = np.repeat(np.arange(counts.size), counts)
        rank = np.concatenate([np.arange(count) for count in counts])
        place = (rank + 0.5) / counts[source]
        self.counts = counts
        self.table = source[np.argsort(place, kind="stable")]
        seen = np.zeros((_SCHEDULE_LENGTH, counts.size), dtype=np.int64)
        seen[np.arange(_SCHEDULE_LENGTH), self.table] = 1
        # For place i of the period: number of earlier draws from the same source.
        self._before = (np.cumsum(seen, axis=0) - seen)[np.arange(_SCHEDULE_LENGTH), self.table]

    def draws(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each draw's source and the number of earlier draws from it; (n,) int64 each."""
        period, place = np.divmod(np.asarray(index, dtype=np.int64), _SCHEDULE_LENGTH)
        source = self.table[place]
        return source, period * self.counts[source] + self._before[place]

"""A rank/select index to count and find the groups of each domain without listing them.

A list would take 8 bytes per group. Cumulative counts take 8 bytes per domain for every block of
512 groups, and a group is found by a binary search over blocks and a scan of one block.
"""

import itertools
from collections.abc import Callable

import numpy as np

_BLOCK = 512  # groups
_BLOCKS_AT_ONCE = 2048  # while building the index
_DRAWS_AT_ONCE = 64  # keeps their blocks in the CPU cache


class DomainIndex:
    """Finds the k-th group of a domain.

    Args:
        domains_of: returns the domains (n,) of groups (n,) int64.
        num_groups, num_domains: groups are 0..num_groups-1, domains 0..num_domains-1.
    """

    def __init__(
        self,
        domains_of: Callable[[np.ndarray], np.ndarray],
        num_groups: int,
        num_domains: int,
    ):
        self._domains_of, self._num_groups = domains_of, num_groups
        self._blocks = -(-num_groups // _BLOCK)
        counts = np.zeros((num_domains, self._blocks + 1), np.int64)
        step = _BLOCK * _BLOCKS_AT_ONCE
        for first in range(0, num_groups, step):
            groups = np.arange(first, min(first + step, num_groups))
            cells = domains_of(groups) + (groups - first) // _BLOCK * num_domains
            table = np.bincount(cells, minlength=-(-groups.size // _BLOCK) * num_domains)
            block = first // _BLOCK + 1
            counts[:, block : block + table.size // num_domains] = table.reshape(-1, num_domains).T
        np.cumsum(counts, axis=1, out=counts)
        self._before = counts  # [d, b]: groups of domain d in the blocks before b

    @property
    def sizes(self) -> np.ndarray:
        """Number of groups of each domain, (num_domains,) int64."""
        return self._before[:, -1]

    def select(self, domains: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the group at position `index` among those of its domain, in ascending order.

        Args: domains (n,) integers; index (n,) int64, below the domain's size.
        Returns: (n,) int64.
        """
        block = self._find_block(domains, index)
        index = index - self._before[domains, block]
        parts = [
            self._select_within(block[i:j], domains[i:j], index[i:j])
            for i, j in itertools.pairwise([*range(0, index.size, _DRAWS_AT_ONCE), index.size])
        ]
        return np.concatenate(parts) if parts else index

    def _select_within(
        self, block: np.ndarray, domains: np.ndarray, index: np.ndarray
    ) -> np.ndarray:
        """Return the group at position `index` among those of its domain in one block; all (n,)."""
        groups = block[:, None] * _BLOCK + np.arange(_BLOCK)
        inside = np.minimum(groups, self._num_groups - 1).ravel()  # the last block may be short
        same = self._domains_of(inside).reshape(groups.shape) == domains[:, None]
        counts = np.count_nonzero(same, axis=1)
        # Position of each draw's group in the flat list of all matches.
        place = np.cumsum(counts) - counts + index
        return inside[np.flatnonzero(same)[place]]

    def _find_block(self, domains: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the last block preceded by at most `index` groups of the domain, (n,) int64."""
        low = np.zeros(index.size, np.int64)
        high = np.full(index.size, self._blocks, np.int64)
        for _ in range(self._blocks.bit_length()):
            middle = (low + high) // 2
            at_most = self._before[domains, middle] <= index
            low, high = np.where(at_most, middle, low), np.where(at_most, high, middle)
        return low

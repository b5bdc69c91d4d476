"""A rank/select index to count and find the groups of each domain without listing them.

A list would take 8 bytes per group. Cumulative counts take 8 bytes per domain for every block of
512 groups, and a group is found by a binary search over blocks and a scan of one block.
"""

from collections.abc import Callable

import numpy as np

_BLOCK = 512  # groups
_BLOCKS_AT_ONCE = 2048  # while building the index


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
        counts = np.zeros((num_domains, -(-num_groups // _BLOCK) + 1), np.int64)
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

    def select(self, domain: int, index: np.ndarray) -> np.ndarray:
        """Return the group at each position `index` in the ascending list of a domain's groups.

        Args: index (n,) int64, below the domain's size.
        Returns: (n,) int64.
        """
        before = self._before[domain]
        block = np.searchsorted(before, index, side="right") - 1
        groups = block[:, None] * _BLOCK + np.arange(_BLOCK)
        inside = np.minimum(groups, self._num_groups - 1).ravel()  # the last block may be short
        same = self._domains_of(inside).reshape(groups.shape) == domain
        counts = np.count_nonzero(same, axis=1)
        # Position of each draw's group in the flat list of all matches.
        place = np.cumsum(counts) - counts + index - before[block]
        return inside[np.flatnonzero(same)[place]]

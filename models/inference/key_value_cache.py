"""Keys and values of earlier tokens, so that generation computes each token once.

A recursive model attends in every pass of its recursion, each time to different keys and values, so
an exact cache stores those of all passes; `cache_bytes` returns its size. `cycles` limits it to the
last outer cycles, as in Geiping et al. 2025 (arXiv 2502.05171), which is an approximation: all
cycles of later tokens attend to the last cycles of earlier ones.

The number of passes is not computed: the first forward pass creates a slot for each attention call.
"""

from typing import Any

import torch
from torch import Tensor

from models.layers import SequenceInfo

_BEFORE, _AFTER = -1, -2  # parts of a forward pass outside the recursion


class KeyValueCache:
    """Keys and values (B, M, positions, K) for each slot; rows may differ in length.

    Every forward pass starts with `begin`; then each attention calls `extend` once, in an order
    that depends only on the depth. A recursion calls `begin_cycle` and `end_cycles` (see
    `SequenceInfo`), so that a cycle finds the slots of the cycle that it overwrites.

    positions: length of the longest text, including the prefix. cycles: outer cycles to keep; None:
    all.
    """

    def __init__(self, positions: int, cycles: int | None = None):
        self.positions, self.kept = positions, cycles
        self.slots: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.cycles = 0
        """Number of outer cycles in the last forward pass."""

    def begin(self, places: Tensor | None, used: int) -> None:
        """Start a forward pass.

        places: (B,) position of each row's single new token; None: all of the first `used`
        positions are new. used: positions filled by the longest row after this pass.
        """
        self.places, self.used = places, used
        self.cycles, self._part, self._calls = 0, _BEFORE, 0

    def begin_cycle(self) -> None:
        """Mark the start of an outer cycle."""
        self._part = self.cycles if self.kept is None else self.cycles % self.kept
        self.cycles, self._calls = self.cycles + 1, 0

    def end_cycles(self) -> None:
        """Mark the end of the last outer cycle."""
        self._part, self._calls = _AFTER, 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (B, M, n, K) of the new positions; return all keys and values, (B, M,
        used, K) each. Positions beyond a row's own must be masked.
        """
        slot, self._calls = (self._part, self._calls), self._calls + 1
        if slot not in self.slots:
            shape = (*key.shape[:2], self.positions, key.shape[3])
            self.slots[slot] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self.slots[slot]
        if self.places is None:  # the first forward pass attends only to itself
            keys[:, :, : self.used], values[:, :, : self.used] = key, value
            return key, value
        rows = torch.arange(len(key), device=key.device)
        keys[rows, :, self.places] = key[:, :, 0]
        values[rows, :, self.places] = value[:, :, 0]
        return keys[:, :, : self.used], values[:, :, : self.used]


@torch.no_grad()
def lay_out(inner: Any, steps: int, cycles: int | None = None) -> KeyValueCache:
    """Run `inner` on a single position at this depth and return the resulting cache."""
    config, device = inner.config, inner.embed_tokens.embedding_weight.device
    cache = KeyValueCache(1, cycles)
    cache.begin(None, 1)
    cos, sin = inner.rotation(torch.zeros(1, 1, dtype=torch.long, device=device))
    x = torch.zeros(1, 1, config.hidden_size, dtype=config.dtype, device=device)
    inner.answer(x, SequenceInfo(cos, sin, None, causal=True, cache=cache), steps)
    return cache


def cache_bytes(
    inner: Any, rows: int, positions: int, steps: int, cycles: int | None = None
) -> int:
    """Return the bytes of a cache for `rows` texts of `positions` positions, including the
    prefix.
    """
    slots = lay_out(inner, steps, cycles).slots.values()
    return rows * positions * sum(key.nbytes + value.nbytes for key, value in slots)

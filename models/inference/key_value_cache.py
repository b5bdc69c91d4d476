"""Keys and values of earlier tokens, so that generation computes each token once.

A recursive model attends again in every pass of its recursion, each time to other keys and values,
so an exact cache keeps those of all passes: `cache_bytes` returns how much that is. `cycles` keeps
those of the last outer cycles only, as Geiping et al. 2025 (arXiv 2502.05171) do: later tokens see
earlier ones as their last cycles left them, which is an approximation.

No formula counts the passes: the first forward lays out a slot for each call of an attention.
"""

from typing import Any

import torch
from torch import Tensor

from models.layers import SequenceInfo

_BEFORE, _AFTER = -1, -2  # parts of a forward outside of the recursion


class KeyValueCache:
    """Keep (B, M, positions, K) keys and values per slot, for rows that may differ in length.

    Every forward starts with `begin`; then each attention calls `extend` once, in an order that
    depends on the depth alone. A recursion calls `begin_cycle` and `end_cycles` (see
    `SequenceInfo`), by which a cycle finds the slots of the one that it overwrites.

    positions: of the longest text, prefix included. cycles: outer cycles to keep; None: all.
    """

    def __init__(self, positions: int, cycles: int | None = None):
        self.positions, self.kept = positions, cycles
        self.slots: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.cycles = 0
        """Outer cycles that the last forward began."""

    def begin(self, places: Tensor | None, used: int) -> None:
        """Start a forward.

        places: (B,) position of each row's one new token; None: all of the first `used` positions
        are new. used: positions that any row has filled after this forward.
        """
        self.places, self.used = places, used
        self.cycles, self._part, self._calls = 0, _BEFORE, 0

    def begin_cycle(self) -> None:
        """Mark that an outer cycle begins."""
        self._part = self.cycles if self.kept is None else self.cycles % self.kept
        self.cycles, self._calls = self.cycles + 1, 0

    def end_cycles(self) -> None:
        """Mark that the last outer cycle has ended."""
        self._part, self._calls = _AFTER, 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (B, M, n, K) of the new positions, and return those to attend to,
        (B, M, used, K) each, of which a row's own positions count."""
        slot, self._calls = (self._part, self._calls), self._calls + 1
        if slot not in self.slots:
            shape = (*key.shape[:2], self.positions, key.shape[3])
            self.slots[slot] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self.slots[slot]
        if self.places is None:  # the first forward attends to itself
            keys[:, :, : self.used], values[:, :, : self.used] = key, value
            return key, value
        rows = torch.arange(len(key), device=key.device)
        keys[rows, :, self.places] = key[:, :, 0]
        values[rows, :, self.places] = value[:, :, 0]
        return keys[:, :, : self.used], values[:, :, : self.used]


@torch.no_grad()
def lay_out(inner: Any, steps: int, cycles: int | None = None) -> KeyValueCache:
    """Return the cache of a text of one position, read by an `inner` at this depth."""
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
    """Return the bytes of a cache for `rows` texts of `positions` positions, prefix included."""
    slots = lay_out(inner, steps, cycles).slots.values()
    return rows * positions * sum(key.nbytes + value.nbytes for key, value in slots)

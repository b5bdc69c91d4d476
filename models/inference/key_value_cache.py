"""Keys and values of earlier tokens, so that generation computes each token once.

A recursive model attends again in every pass of its recursion, each time to other keys and values,
so an exact cache keeps those of all passes. That is much: `cache_bytes` says how much beforehand.
`cycles` keeps those of fewer outer cycles, each writing over what an earlier one wrote, as Geiping
et al. 2025 (arXiv 2502.05171) do: later tokens see earlier ones as their last cycles left them,
which is an approximation.
"""

from typing import Any

import torch
from torch import Tensor


def cache_slots(config: Any, steps: int, cycles: int | None = None) -> tuple[int, int]:
    """Passes of the recursion whose keys and values are kept, and passes of the refinement.

    cycles: outer cycles kept; None keeps all, which is exact.
    """
    recursion, cycle, refinement = config.answer_passes(steps)
    kept = recursion if cycles is None else min(recursion, cycles * cycle)
    return kept, refinement


def cache_bytes(
    config: Any, rows: int, positions: int, steps: int, cycles: int | None = None
) -> int:
    """Bytes of a cache for `rows` texts of `positions` positions, prefix included."""
    heads = config.key_value_heads * (config.hidden_size // config.num_heads)
    return (
        sum(cache_slots(config, steps, cycles)) * 2 * rows * positions * heads
        * torch.finfo(config.dtype).bits // 8
    )  # fmt: skip


class KeyValueCache:
    """Holds (B, M, positions, K) keys and values a slot, for rows that may have different lengths.

    Every forward begins with `begin`; then each attention in it calls `extend` once, always in the
    same order, which is how a pass finds its slot.
    """

    def __init__(
        self,
        config: Any,
        rows: int,
        positions: int,
        steps: int,
        cycles: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.recursion = config.answer_passes(steps)[0]
        self.kept, refinement = cache_slots(config, steps, cycles)
        head = config.hidden_size // config.num_heads
        shape = (self.kept + refinement, rows, config.key_value_heads, positions, head)
        self.keys = torch.zeros(shape, dtype=config.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.rows = torch.arange(rows, device=device)

    def begin(self, positions: Tensor | None, used: int) -> None:
        """positions (B,): where each row's one new token stands, or None for all of the first
        `used` positions. used: positions that any row has filled after this forward."""
        self.positions, self.used, self.passes = positions, used, 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Notes key and value (B, M, n, K) of this pass's new positions; what to attend to,
        (B, M, used, K) each, of which a row's own positions count."""
        slot = self.passes % self.kept
        if self.passes >= self.recursion:
            slot = self.kept + self.passes - self.recursion
        self.passes += 1
        keys, values = self.keys[slot], self.values[slot]
        if self.positions is None:  # the first forward: it attends to itself
            keys[:, :, : self.used], values[:, :, : self.used] = key, value
            return key, value
        keys[self.rows, :, self.positions] = key[:, :, 0]
        values[self.rows, :, self.positions] = value[:, :, 0]
        return keys[:, :, : self.used], values[:, :, : self.used]

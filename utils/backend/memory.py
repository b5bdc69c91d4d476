"""Out of memory, in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.core.errors import UserError

# What torch raises without a class of its own: on the CPU, on Apple GPUs.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Raise UserError where memory runs out inside. advice: when that was, and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise UserError(f"out of memory {advice}") from None

"""The CPU: a single process, or several under torchrun with gloo."""

import ctypes
import os
from typing import Any

import torch

from utils.backend.base import Backend

# of mallopt in malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class CPUBackend(Backend):
    """The CPU."""

    name = "cpu"

    def __init__(self) -> None:
        super().__init__()
        keep_freed_memory()
        if self.world_size > 1:
            # if every rank used all cores, the ranks would slow each other down severely
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))

    def release_memory(self) -> None:
        super().release_memory()
        if (trim := _c_function("malloc_trim")) is not None:
            trim(0)


def keep_freed_memory(largest: int = 1 << 30) -> None:
    """Have the allocator keep freed memory for the next step.

    Otherwise glibc returns large tensors to the system, and each page of their successors is a page
    fault. Has no effect with another C library.

    largest: bytes of the largest tensors that it keeps; glibc itself keeps those up to 32 MiB.
    """
    if (mallopt := _c_function("mallopt")) is None:
        return
    # older versions refuse more than 32 MiB, and the second limit alone would make things worse
    if mallopt(_MMAP_THRESHOLD, largest) or mallopt(_MMAP_THRESHOLD, 32 << 20):
        mallopt(_TRIM_THRESHOLD, 2 * largest - 1)


def _c_function(name: str) -> Any:
    """Return a function of the C library; None if it has none of this name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None

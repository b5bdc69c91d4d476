"""Measure the memory of the host, and replace out-of-memory errors by a UserError."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.core.errors import UserError

# Parts of out-of-memory messages that have no exception class, on the CPU and on Apple GPUs.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that a device or the host is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Raise UserError if memory runs out within the context.

    advice: when it happened and what to change, to complete the sentence "out of memory ...".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise UserError(f"out of memory {advice}") from None


def free_host_memory() -> int:
    """Return the free memory of this host in bytes, within the limit of its container."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text("utf-8").splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text("utf-8").strip()).isdigit():
        free = min(free, max(0, int(text) - int(used.read_text("utf-8"))))
    return free


def peak_host_memory() -> int:
    """Return the peak memory of this process in bytes; on Linux, since the run began."""
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

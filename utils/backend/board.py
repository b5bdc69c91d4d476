"""The store of torchrun, through which ranks connect, and a message board for threads."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def connect_store(launch_number: int, timeout: timedelta) -> dist.Store:
    """Connect to the launcher's store.

    Keys are separate for each restart of the ranks and for each run of a sweep.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"attempt_{attempt}_{launch_number}", store)


class Board:
    """Texts by name that every rank can read without a collective.

    Does nothing in a single process, or once the store does not answer: its process has then ended,
    and each further attempt would take seconds. Uses a separate connection, so that a thread can
    post while the main thread is in a collective.
    """

    def __init__(self, world_size: int, launch_number: int):
        self._launch_number = launch_number
        self._usable = world_size > 1 and "MASTER_PORT" in os.environ
        self._store: dist.Store | None = None

    def post(self, name: str, text: str) -> None:
        """Write `text` under `name`."""
        self._try(lambda store: store.set(name, text))

    def read(self, name: str) -> str | None:
        """Return the last text that any rank posted under `name`; None without one."""
        return self._try(lambda s: s.get(name).decode() if s.check([name]) else None)

    def _try(self, act: Callable[[dist.Store], T]) -> T | None:
        if not self._usable:
            return None
        try:
            if self._store is None:
                self._store = connect_store(self._launch_number, timedelta(seconds=10))
            return act(self._store)
        except (RuntimeError, OSError):
            self._usable = False
            return None

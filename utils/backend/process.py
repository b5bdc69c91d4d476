"""Handle the signals that end a run, and a launcher that dies before its ranks."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Received = Sequence[int]  # numbers of the signals received so far

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals on which a run saves and exits: from a scheduler, Ctrl-C or a lost connection."""


@contextmanager
def catch_stop_signals(announce: bool) -> Iterator[Received]:
    """Collect the numbers of stop signals within the context; a second SIGINT interrupts
    immediately.

    announce: print that the run will stop.
    """
    received: list[int] = []
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # writing to a closed terminal would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in terminals:
                os.dup2(nowhere, stream)
            os.close(nowhere)
        if announce and not received:
            name = signal.Signals(number).name
            # Not print: this may interrupt a print.
            os.write(2, f"\n{name}: saving after this step, then exiting\n".encode())
        received.append(number)

    caught = [*STOP_SIGNALS]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: the run should continue
        caught.remove(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in caught}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_with_launcher() -> None:
    """Ask the kernel to send SIGTERM if the launcher dies, so that no orphaned rank keeps running.

    Does nothing without torchrun or on systems other than Linux.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

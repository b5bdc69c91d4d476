"""What a test may leave behind: nothing that Athena started, and no file of its own open."""

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

THREADS = ("read-ahead", "checkpoint", "watchdog")
"""Names, or their beginnings, of the threads that Athena starts."""


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(THREADS)}


def children() -> set[str]:
    """Python processes that the main thread started and that have not ended, as `pid command`.

    Others belong to libraries, such as wandb's, which serves all runs of a process, or to work that
    goes on beside several tests.
    """
    found = set()
    started = Path(f"/proc/self/task/{os.getpid()}/children")
    if not started.is_file():  # another system than Linux
        return found
    for pid in started.read_text("utf-8").split():
        try:
            status = Path("/proc", pid, "stat").read_text("utf-8").rpartition(")")[2].split()[0]
            words = Path("/proc", pid, "cmdline").read_text("utf-8").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if status != "Z" and Path(words[0]).name.startswith("python"):
            found.add(" ".join([pid, *words]))
    return found


def files_below(folder: Path) -> set[str]:
    """Open files and memory maps below a folder, those of garbage left out."""
    if found := _files_below(folder):
        gc.collect()
        found = _files_below(folder)
    return found


def _files_below(folder: Path) -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(descriptor))
        except OSError:
            continue
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        found.add(line.partition("/")[1] + line.partition("/")[2])
    return {path for path in found if Path(path).is_relative_to(folder)}


def wait_for_none(look: Callable[[], set], seconds: float = 3.0) -> set:
    """What is still there after a while: threads and processes may need a moment to end."""
    left = look()
    if left:
        deadline = time.monotonic() + seconds
        while (left := look()) and time.monotonic() < deadline:
            time.sleep(0.02)
    return left

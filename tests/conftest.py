"""What all tests share: seeds, tiers, and the fixtures of training.

Every test draws from a seed of its own, which follows from ATHENA_TEST_SEED (0 where it is unset)
and the test's name. A failure prints the line that repeats it.

Tiers: tests without a mark run within the process, in `make test`. `canary`: starts processes and
runs in `make test` all the same; there are three. `slow`: starts processes or takes seconds, in
`make test-all`. `nightly`: long runs and whole matrices, in `make test-nightly`.
"""

import gc
import os
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from leftovers import children, files_below, threads, wait_for_none
from seeds import BASE_SEED, SEED_VARIABLE, seed_for
from training_tools import puzzle_corpus, run_training, text_corpus, text_run, write_plugin

from utils.core.plugins import use_plugins

__all__ = ["puzzle_corpus", "run_training", "text_corpus", "text_run", "write_plugin"]

# For the processes that tests start: idle threads of two processes wait for work on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TIERS = ("canary", "slow", "nightly")

FAILED = pytest.StashKey[bool]()
_in_process = False  # whether the present test may start no Python


def pytest_report_header() -> str:
    return f"{SEED_VARIABLE}={BASE_SEED}"


def pytest_runtest_setup(item) -> None:
    global _in_process
    _in_process = not {mark.name for mark in item.iter_markers()} & set(TIERS)


def _watch_processes(event: str, arguments: tuple) -> None:
    """Refuse Python processes to tests of `make test`: such tests belong in a slower tier."""
    own = threading.current_thread() is threading.main_thread()  # not work beside several tests
    if event == "subprocess.Popen" and _in_process and own:
        command = arguments[1] if isinstance(arguments[1], list | tuple) else [arguments[1]]
        program = Path(os.fsdecode(command[0])).name
        if program.startswith(("python", "torchrun", "bash", "make")):
            pytest.fail(f"starts a process, but has no mark slow: {program}")


sys.addaudithook(_watch_processes)


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seed all global generators, and return the seed."""
    value = seed_for(request.node.nodeid)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def set_threads():
    """Set PyTorch's number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_plugins():
    """Forget the plug-ins that a test used."""
    yield
    use_plugins(())


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # collecting the garbage of a test need not look at all modules


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.stash[FAILED] = report.failed
    if report.failed:
        repeat = f"{SEED_VARIABLE}={BASE_SEED} python -m pytest '{item.nodeid}'"
        report.sections.append(("to repeat", repeat))
    return report


@pytest.fixture(autouse=True)
def nothing_left(request):
    """Fail a test that leaves threads or processes of Athena, or open files of its own folder."""
    before = threads(), children()
    folders = [request.getfixturevalue("tmp_path")] if "tmp_path" in request.fixturenames else []
    yield
    if not Path("/proc/self/fd").is_dir():
        return
    request.node.funcargs.clear()  # what fixtures returned is held by nobody else
    left = wait_for_none(lambda: threads() - before[0])
    left |= wait_for_none(lambda: children() - before[1])
    for folder in folders:
        left |= files_below(folder)
    if left and not request.node.stash.get(FAILED, False):  # else its traceback may hold them
        pytest.fail(f"left behind: {', '.join(sorted(map(str, left)))}")

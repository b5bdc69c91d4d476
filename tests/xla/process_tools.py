"""Tests in processes of their own, because what they start must find an untouched device."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_tools import ROOT, finish

HERE = Path(__file__).resolve().parent
# As it is before tests begin: those beside which processes start change it for themselves.
ENVIRONMENT = dict(os.environ)
Work = Callable[[Path, Path], Any]


def after(work: Work) -> Callable[[Callable], Callable]:
    """Marks a test of the `outcome` of `work(text_corpus, tmp_path)`.

    The work runs in a thread beside other tests, so it starts processes and trains nothing itself:
    threads share one source of random numbers.
    """

    def mark(test: Callable) -> Callable:
        test.waits_for = work  # type: ignore[attr-defined]
        return test

    return mark


def in_background(work: Work) -> Callable:
    """A test that consists of such work."""

    def test(outcome):
        assert outcome is None

    test.__doc__ = work.__doc__
    return after(work)(test)


def start(*command: str, **environment: str) -> subprocess.Popen:
    """Python in a process of its own; finds the project and the tests' modules."""
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE)))
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=ROOT,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places} | environment,
    )


def run(*command: str, **environment: str) -> str:
    """Standard output of such a process, which must succeed."""
    code, out, err = finish(start(*command, **environment))
    assert code == 0, out + err
    return out

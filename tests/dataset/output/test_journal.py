"""A build's memory: what was committed outlasts a crash, what was not does not."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from seeds import draw_rng

from dataset.output.journal import Journal
from utils.core.errors import UserError


def test_digests_are_told_apart_by_kind(tmp_path):
    journal = Journal(tmp_path / "j")
    assert journal.add(b"a") and not journal.add(b"a")
    assert journal.add(b"a", kind=1) and not journal.contains(b"b", kind=1)
    assert journal.contains(b"a") and journal.contains(b"a", kind=1)


def test_values_survive_with_their_arrays(tmp_path):
    journal = Journal(tmp_path / "j")
    array = draw_rng().integers(0, 99, (3, 4)).astype(np.uint16)
    assert journal["state"] is None
    journal.commit(state={"tokens": array, "list": [1, None, {"x": "ä"}], "empty": array[:0]})
    journal.close()
    state = Journal(tmp_path / "j")["state"]
    assert state["tokens"].dtype == np.uint16 and (state["tokens"] == array).all()
    assert state["list"] == [1, None, {"x": "ä"}] and state["empty"].shape == (0, 4)


@pytest.mark.slow
def test_a_killed_process_leaves_its_last_commit(tmp_path):
    code = """if True:
        import os, signal
        from dataset.output.journal import Journal
        journal = Journal("j")
        journal.add(b"kept")
        journal.commit(state=1)
        for number in range(100_000):  # more than the cache holds, so that the file is written
            journal.add(b"%032d" % number)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == -signal.SIGKILL
    journal = Journal(tmp_path / "j")
    assert journal["state"] == 1
    assert not journal.add(b"kept") and journal.add(b"%032d" % 7)


def test_one_build_at_a_time(tmp_path):
    journal = Journal(tmp_path / "j")
    with pytest.raises(UserError, match="another build is running"):
        Journal(tmp_path / "j")
    journal.close()
    Journal(tmp_path / "j")

"""scripts/benchmarks/commits.py: runs of two checkouts alternate, on the same data."""

import re
from pathlib import Path

import pytest
from training_tools import TINY

from scripts.benchmarks import commits
from utils.core.errors import UserError

RUN = [*TINY, "epochs=20", "max_steps=6", "eval_max_batches=1"]


@pytest.mark.slow
def test_both_checkouts_are_trained_and_compared(text_corpus, tmp_path, capsys):
    other = tmp_path / "other"
    other.symlink_to(commits.ROOT)
    commits.run([f"other={other}", "rounds=1", "seconds=60", f"data_paths=[{text_corpus}]", *RUN])
    printed = capsys.readouterr().out
    speeds = [float(x) for x in re.findall(r"([\d.]+) steps/s, \d", printed)]
    assert len(speeds) == 2 and min(speeds) > 0
    this, old = speeds
    assert float(printed.split()[-1]) == pytest.approx(this / old, rel=0.1, abs=0.01)
    assert "bits per byte" in printed


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_reason(text_corpus):
    with pytest.raises(UserError, match="global_batch_size"):
        commits.train(commits.ROOT, Path("unused"), [*RUN, "global_batch_size=0"])


def test_a_directory_without_a_checkout_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        commits.run([f"other={tmp_path}"])

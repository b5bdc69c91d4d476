"""A run that is killed again and again ends like one that was not.

    python -m pytest -m nightly -s tests/test_kills.py

Trains a tiny model on two CPU ranks without a break, then again with SIGKILL at random moments (to
all processes at once, or to one rank), restarted each time with the same command, which resumes by
itself (resume=auto). Every tensor of the last checkpoints must be equal bit for bit, and after
every kill every checkpoint folder must be complete.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from scripts.gpu_checks.runs import TINY, different_tensors, small_corpora
from utils.checkpoint.format import Checkpoint
from utils.config.values import assignment

ROOT = Path(__file__).resolve().parents[1]
SAVING = """
    checkpoint_interval=7 keep_checkpoints=2 eval_interval=0.03 eval_max_batches=12
    log_interval=10 num_workers=1 device_type=cpu run_name=kills
""".split()
PHASES = ("starting", "training", "saving", "evaluating")
FOLDER = "ATHENA_KILLS"  # variable that names the folder of phases to a rank


def worker() -> None:
    """Run one rank, with a file for each phase it is in, by which kills are counted."""
    import pretrain
    from utils.checkpoint.writer import CheckpointWriter

    folder = Path(os.environ[FOLDER])

    def noted(phase, act, after="training"):
        def wrapper(*args, **options):
            path = folder / f"{phase}_{os.environ['RANK']}"
            path.touch()
            try:
                return act(*args, **options)
            finally:
                path.unlink(missing_ok=True)

        return wrapper

    pretrain.run_evaluation = noted("evaluating", pretrain.run_evaluation)
    pretrain.take_steps = noted("training", pretrain.take_steps)
    for name in ("_write", "_commit"):
        setattr(CheckpointWriter, name, noted("saving", getattr(CheckpointWriter, name)))
    pretrain.main()


def start(overrides: Sequence[str], phases: Path, log: Path) -> subprocess.Popen:
    shutil.rmtree(phases, ignore_errors=True)
    phases.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with log.open("a", encoding="utf-8") as out:
        return subprocess.Popen(
            [*command, __file__, *overrides], cwd=ROOT, stdout=out, stderr=out,
            env=os.environ
            | {FOLDER: str(phases), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, the nearest first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    except OSError:
        return []
    found = [int(child) for child in children]
    return found + [below for child in found for below in descendants(child)]


def kill(process: subprocess.Popen, phases: Path, one_rank: bool) -> str:
    """Send SIGKILL to all processes of a run, or to one rank; return the phase the run was in."""
    ranks = descendants(process.pid)
    doing = {path.name.partition("_")[0] for path in phases.iterdir()}
    phase = next((phase for phase in reversed(PHASES) if phase in doing), "starting")
    victims = [random.choice(ranks)] if one_rank and ranks else [process.pid, *ranks]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=90)  # after one rank's death the launcher ends the other
    for pid in ranks:  # they end with their launcher, a moment later
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    return phase


def run_to_end(overrides: list[str], folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Run until the last step; return the tensors of its checkpoint."""
    log = folder.parent / "log.txt"
    status = start(overrides, folder.parent / "phases", log).wait()
    assert status == 0, log.read_text("utf-8")[-3000:]
    return Checkpoint(folder / f"step_{steps}").all_tensors()


@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(2, 150, marks=pytest.mark.slow),
        pytest.param(100, 4000, marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_is_killed_ends_like_one_that_was_not(kills, steps, tmp_path):
    phases, log = tmp_path / "phases", tmp_path / "log.txt"
    corpora = small_corpora(tmp_path / "corpora")
    overrides = [assignment("data_paths", corpora), f"max_steps={steps}", *TINY, *SAVING]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = run_to_end([f"checkpoint_path={whole}", *overrides], whole, steps)
    lines = (whole / "metrics.jsonl").read_text("utf-8").splitlines()
    loop = json.loads(lines[-1])["time"] - json.loads(lines[0])["time"]

    command, begun = [f"checkpoint_path={killed}", *overrides], time.monotonic()
    counts, seen = collections.Counter[str](), 0
    share = 0.35 * loop / kills  # on average between two kills; a machine may get faster
    for i in range(kills):
        process = start(command, phases, log)
        if random.random() > 0.1:  # else during startup
            while process.poll() is None and not list(phases.glob("training_*")):
                time.sleep(0.01)
            time.sleep(random.uniform(0, 2 * share))
        else:
            time.sleep(random.uniform(0, 6))
        assert process.poll() is None, f"the run ended after {i} kills; it needs more steps"
        one_rank = random.random() < 0.25
        phase = kill(process, phases, one_rank)
        counts[f"{phase}, {'one rank' if one_rank else 'all processes'}"] += 1
        for folder in killed.glob("step_*"):
            Checkpoint(folder).verify()
            seen += 1
    found = run_to_end(command, killed, steps)
    print("\n| SIGKILL while | times |\n|---|---|")
    for what in sorted(counts):
        print(f"| {what} | {counts[what]} |")
    print(f"\n{kills} kills in {time.monotonic() - begun:.0f} s; {seen} times a checkpoint folder "
          "was seen after a kill, always complete")  # fmt: skip
    assert different_tensors(expected, found) == []


def test_a_single_different_number_is_seen():
    one = {"model/a": torch.zeros(3), "ema/b": torch.ones(2)}
    assert not different_tensors(one, {name: value.clone() for name, value in one.items()})
    assert different_tensors(one, one | {"ema/b": torch.tensor([1.0, 1.0 + 1e-7])}) == ["ema/b"]
    assert different_tensors(one, {"ema/b": one["ema/b"]}) == ["model/a"]


if __name__ == "__main__":
    worker()

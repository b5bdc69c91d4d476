r"""Kills a run again and again, and compares what comes out with a run that was left alone.

    python scripts/crash_test.py --kills 100 --output-dir data/crash_test

Trains a tiny model on two CPU ranks without a break, then again with SIGKILL at random moments
(all processes at once, or one rank alone), restarted each time with the same command, which
goes on by itself (resume=auto). Every tensor of the last checkpoints must be equal bit for bit, and
after every kill every checkpoint folder must be whole. Ends with status 1 otherwise.
"""

import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from scripts.small_corpora import TINY, small_corpora
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.config.values import assignment
from utils.core.console import run_cli
from utils.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SAVING = """
    checkpoint_interval=7 keep_checkpoints=2 eval_interval=0.03 eval_max_batches=12
    log_interval=10 num_workers=1 device_type=cpu run_name=crash_test
""".split()
PHASES = ("starting", "training", "saving", "evaluating")


def worker() -> None:
    """One rank of the run; notes what it is doing in a file, so that kills can be counted by it."""
    import pretrain
    from utils.checkpoint.writer import CheckpointWriter

    folder = Path(os.environ["ATHENA_CRASH_TEST"])

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
            env=os.environ | {"ATHENA_CRASH_TEST": str(phases), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, the nearest first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    except OSError:
        return []
    found = [int(child) for child in children]
    return found + [below for child in found for below in descendants(child)]


def kill(process: subprocess.Popen, phases: Path, one_rank: bool) -> str:
    """SIGKILL to all processes of a run, or to one rank; what the run was doing."""
    ranks = descendants(process.pid)
    doing = {path.name.partition("_")[0] for path in phases.iterdir()}
    phase = next((phase for phase in reversed(PHASES) if phase in doing), "starting")
    victims = [random.choice(ranks)] if one_rank and ranks else [process.pid, *ranks]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        process.wait(timeout=90)  # after one rank's death the launcher ends the other
    except subprocess.TimeoutExpired:
        raise UserError("the run did not end within 90 s of the death of one rank") from None
    for pid in ranks:  # they end with their launcher, a moment later
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    return phase


def check_whole(run: Path) -> int:
    """How many checkpoints can be seen; an error if one of them is not what was saved."""
    folders = list(run.glob("step_*"))
    for folder in folders:
        Checkpoint(folder).verify()
    return len(folders)


def run_to_end(overrides: list[str], output: Path, steps: int) -> Path:
    process = start(overrides, output / "phases", output / "log.txt")
    if process.wait():
        raise UserError(f"the run ended with status {process.returncode}; see {output}/log.txt")
    (last,) = [f for f in checkpoints_of(Path(overrides[0].partition("=")[2])) if f.name ==
               f"step_{steps}"]  # fmt: skip
    return last


def crash_test(args: argparse.Namespace) -> None:
    output: Path = args.output_dir.expanduser().resolve()
    shutil.rmtree(output, ignore_errors=True)
    corpora = small_corpora(output / "corpora")
    overrides = [assignment("data_paths", corpora), f"max_steps={args.steps}", *TINY, *SAVING]
    random.seed(args.seed)

    begun = time.monotonic()
    whole = run_to_end([f"checkpoint_path={output / 'whole'}", *overrides], output, args.steps)
    lines = (output / "whole" / "metrics.jsonl").read_text("utf-8").splitlines()
    loop = json.loads(lines[-1])["time"] - json.loads(lines[0])["time"]
    total = time.monotonic() - begun
    print(
        f"without a break: {args.steps} steps in {total:.0f} s, {total - loop:.0f} s of them start"
    )

    run, counts, begun = output / "killed", collections.Counter[str](), time.monotonic()
    killed = [f"checkpoint_path={run}", *overrides]
    looked_at = 0
    share = 0.35 * loop / args.kills  # on average between two kills; a machine may get faster
    for i in range(args.kills):
        process = start(killed, output / "phases", output / "log.txt")
        if random.random() > 0.1:  # else somewhere in the start
            while process.poll() is None and not list((output / "phases").glob("training_*")):
                time.sleep(0.01)
            time.sleep(random.uniform(0, 2 * share))
        else:
            time.sleep(random.uniform(0, 6))
        if process.poll() is not None:
            raise UserError(
                f"the run ended after {i} kills (status {process.returncode}, see "
                f"{output}/log.txt); raise --steps to have it killed more often"
            )
        one_rank = random.random() < 0.25
        phase = kill(process, output / "phases", one_rank)
        counts[f"{phase}, {'one rank' if one_rank else 'all processes'}"] += 1
        looked_at += check_whole(run)
        newest = checkpoints_of(run)[-1:]
        print(f"kill {i + 1}: {phase}, {'one rank' if one_rank else 'all'}, "
              f"newest {newest[0].name if newest else 'none'}", flush=True)  # fmt: skip
    last = run_to_end(killed, output, args.steps)
    seconds = time.monotonic() - begun
    print("\n| SIGKILL while | times |\n|---|---|")
    for what in sorted(counts):
        print(f"| {what} | {counts[what]} |")
    print(f"\n{args.kills} kills in {seconds:.0f} s; {looked_at} times a checkpoint folder was "
          "seen after a kill, always whole")  # fmt: skip
    compare(Checkpoint(whole).all_tensors(), Checkpoint(last).all_tensors())


def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    different = [k for k in one if k not in other or not torch.equal(one[k], other[k])]
    different += sorted(other.keys() - one.keys())
    numbers = sum(tensor.numel() for tensor in one.values())
    print(
        f"{len(one)} tensors ({numbers:,} numbers) of the last checkpoints: {len(different)} differ"
    )
    if different:
        raise UserError(f"different from the run without a break: {', '.join(different[:5])}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python scripts/crash_test.py",
        description="Kills a two-rank CPU run at random moments and checks that nothing is lost.",
    )
    add = parser.add_argument
    add("--kills", type=int, default=100, help="each takes 15 to 20 s (default: 100)")
    add("--steps", type=int, default=4000, help="of the run (default: 4000)")
    add("--seed", type=int, default=None, help="of the moments (default: another each time)")
    add("--output-dir", type=Path, default=Path("data/crash_test"), help="is emptied first "
        "(default: data/crash_test)")  # fmt: skip
    args = parser.parse_args(argv)
    run_cli(lambda: crash_test(args))


if __name__ == "__main__":
    worker() if "ATHENA_CRASH_TEST" in os.environ else main()

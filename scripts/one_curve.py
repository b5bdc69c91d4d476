r"""The same small run on every backend that is here: how far apart are losses and weights?

    python scripts/one_curve.py
    python scripts/one_curve.py --xla-python ~/.cache/athena/xla-1234567890/bin/python

Twenty steps at learning rate 1e-3 without warm-up, with rows that halt at different steps: on one
CPU rank (the reference), in two micro-batches, on two ranks with DDP and with FSDP, and on
PyTorch/XLA and CUDA where they are. Prints a table and ends with status 1 where float32 losses
differ by more than 1e-5, or float64 losses or weights by more than 1e-7.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from scripts.small_corpora import TINY, small_corpora
from utils.checkpoint.format import Checkpoint
from utils.config.values import assignment
from utils.core.console import run_cli
from utils.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
BARS = {"float32": 1e-5, "float64": 1e-7}
RUN = f"max_steps={STEPS} log_interval=1 checkpoint_interval=null eval_max_batches=4".split()


class Way(NamedTuple):
    """device_type, overrides, ranks, interpreter and environment of a run."""

    device_type: str
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    python: str = sys.executable
    env: tuple[tuple[str, str], ...] = ()


class Curve(NamedTuple):
    """What a run gave: the loss of every step, the last evaluation's, mean ACT steps, weights."""

    losses: list[float]
    evaluation: float
    steps: list[float]
    weights: dict[str, torch.Tensor]


def ways(xla_python: Path | None) -> dict[str, Way]:
    """Every way that this machine has, the reference first."""
    found = {
        "cpu x 1": Way("cpu"),
        "cpu x 1, 2 micro-batches": Way("cpu", ("grad_accum_steps=2",)),
        "cpu x 2, DDP": Way("cpu", (), 2),
        "cpu x 2, DDP, 2 micro-batches": Way("cpu", ("grad_accum_steps=2",), 2),
        "cpu x 2, FSDP": Way("cpu", ("parallel=fsdp",), 2),
    }
    if xla_python is not None:
        # the CPU's compiler at its lowest level: quick to compile, the same arithmetic
        env = (("PJRT_DEVICE", "CPU"), ("XLA_FLAGS", "--xla_backend_optimization_level=0"))
        found["xla x 1 (on the CPU)"] = Way("xla", (), 1, str(xla_python), env)
    for ranks in (1, 2):
        if torch.cuda.device_count() >= ranks:
            found[f"cuda x {ranks}"] = Way("cuda", (), ranks)
    return found


def run(way: Way, overrides: Sequence[str], folder: Path) -> Curve:
    """Trains; the run's folder is `folder`, its output goes to `folder`.log."""
    command = [way.python]
    if way.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={way.ranks}"]
    command += ["pretrain.py", f"device_type={way.device_type}", "run_name=one_curve"]
    command += [assignment("checkpoint_path", folder), *overrides, *way.overrides]
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as out:
        env = os.environ | {"OMP_NUM_THREADS": "1"} | dict(way.env)
        status = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=env).returncode
    if status:
        raise UserError(f"`{' '.join(command)}` ended with status {status}; see {log}")
    return read_curve(folder)


def read_curve(folder: Path) -> Curve:
    """Read what a run of STEPS steps left in its folder."""
    lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    ]

    def values(name: str) -> list[float]:
        return [line[name] for line in lines if name in line]

    tensors = Checkpoint(folder / f"step_{STEPS}").all_tensors()
    kept = {name: v for name, v in tensors.items() if name.startswith(("model/", "ema/"))}
    return Curve(
        values("train/lm_loss"), values("eval/all/lm_loss")[-1], values("train/steps"), kept
    )


def apart(one: Curve, other: Curve) -> tuple[float, float]:
    """Largest difference of losses, and of weights (averaged ones included)."""
    losses = zip([*one.losses, one.evaluation], [*other.losses, other.evaluation], strict=True)
    assert one.weights.keys() == other.weights.keys()
    weights = ((one.weights[k].double() - other.weights[k].double()).abs() for k in one.weights)
    return max(abs(a - b) for a, b in losses), max(float(d.max()) for d in weights)


def one_curve(args: argparse.Namespace) -> None:
    output: Path = args.output_dir.expanduser().resolve()
    shutil.rmtree(output, ignore_errors=True)
    paths = assignment("data_paths", small_corpora(output / "corpora"))
    failures, reference = [], {}
    print(f"\n| {STEPS} steps | float32: losses differ by | float64: losses | weights |")
    print("|---|---|---|---|", flush=True)
    for name, way in ways(args.xla_python).items():
        cells = [name]
        for dtype, bar in BARS.items():
            overrides = [paths, *TINY, *RUN, f"arch.forward_dtype={dtype}"]
            folder = output / re.sub(r"\W+", "_", f"{name} {dtype}")
            curve = run(way, overrides, folder)
            if dtype not in reference:
                reference[dtype] = curve
                kinds = len(set(curve.steps))
                if kinds < 3:
                    raise UserError(
                        f"rows halt at the same steps ({kinds} means): nothing is shown"
                    )
            losses, weights = apart(reference[dtype], curve)
            cells += [f"{losses:.1e}"] + ([f"{weights:.1e}"] if dtype == "float64" else [])
            if not max(losses, weights if dtype == "float64" else 0.0) <= bar:
                failures.append(f"{name} in {dtype}: losses {losses:.1e}, weights {weights:.1e}")
        print(f"| {' | '.join(cells)} |", flush=True)
    if failures:
        raise UserError(f"further apart than {BARS}: {'; '.join(failures)}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python scripts/one_curve.py",
        description="Compares the same small run on all backends that are here.",
    )
    add = parser.add_argument
    add("--xla-python", type=Path, metavar="PYTHON", help="an interpreter that has torch_xla, such "
        "as that of `make test-xla` (default: XLA is left out)")  # fmt: skip
    add("--output-dir", type=Path, default=Path("data/one_curve"), help="is emptied first "
        "(default: data/one_curve)")  # fmt: skip
    args = parser.parse_args(argv)
    run_cli(lambda: one_curve(args))


if __name__ == "__main__":
    main()

"""Corpora, overrides and results of small runs, which are compared bit by bit or by their
curves.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scripts.smoke_test import ROOT, call, write_text
from utils.checkpoint.format import Checkpoint
from utils.config.values import assignment
from utils.core.errors import UserError
from utils.monitoring.run_log import read_records

# A model that trains in seconds and has everything a checkpoint must restore: rows that halt at
# different steps, an identifier embedding, averages, and a stream of two corpora.
TINY = """
    arch=athena_trm_tiny arch.hidden_size=32 arch.puzzle_emb_ndim=32 arch.halt_max_steps=4
    arch.force_min_steps=1 arch.halt_exploration_prob=0.3 arch.post_refinement_steps=0
    global_batch_size=8 epochs=null lr=1e-3 lr_warmup_steps=0 puzzle_emb_lr=1e-3 ema_rate=0.99
""".split()
STEPS = 20
RUN = f"max_steps={STEPS} log_interval=1 checkpoint_interval=null eval_max_batches=4".split()
BARS = {"float32": 1e-5, "float64": 1e-7}  # tolerances of losses; in float64 also of weights


class Way(NamedTuple):
    """How a run is started: device_type, overrides, ranks, interpreter, environment."""

    device_type: str
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    python: str = sys.executable
    env: tuple[tuple[str, str], ...] = ()


class Curve(NamedTuple):
    """The result of a run: the loss of each step and of the last evaluation, mean ACT steps, and
    weights, averaged ones included."""

    losses: list[float]
    evaluation: float
    steps: list[float]
    weights: dict[str, Tensor]


def small_corpora(folder: Path) -> list[Path]:
    """Build two corpora with the same tokenizer, rows of 32 tokens and budgets of 1 to 6 ACT
    steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = write_text(folder, None).read_text(encoding="utf-8").splitlines(keepends=True)
    tokenizer, corpora = folder / "tokenizer.json", []
    for i, name in enumerate(("first", "second")):
        part = folder / f"{name}.jsonl"
        part.write_text("".join(lines[i::2]), encoding="utf-8")
        if i == 0:
            call("-m", "dataset.train_tokenizer", "--input-files", part, "--vocab-size", "300",
                 "--output", tokenizer)  # fmt: skip
        corpora.append(folder / name)
        call("-m", "dataset.build_corpus_dataset", "--tokenizer-json", tokenizer, "--input-files",
             part, "--seq-len", "32", "--train-ratio", "0.9", "--min-iterations", "1",
             "--max-iterations", "6", "--output-dir", corpora[-1], "--overwrite")  # fmt: skip
    return corpora


def run(way: Way, overrides: Sequence[str], folder: Path) -> Curve:
    """Train in separate processes, into `folder`; write the output to `folder`.log."""
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
    """Read the result of a run of STEPS steps from its folder."""
    lines = read_records(folder)

    def values(name: str) -> list[float]:
        return [line[name] for line in lines if name in line]

    tensors = Checkpoint(folder / f"step_{STEPS}").all_tensors()
    kept = {name: v for name, v in tensors.items() if name.startswith(("model/", "ema/"))}
    evaluation = values("eval/all/lm_loss")[-1]
    return Curve(values("train/lm_loss"), evaluation, values("train/steps"), kept)


def apart(one: Curve, other: Curve) -> tuple[float, float]:
    """Return the largest difference of losses, and of weights."""
    losses = zip([*one.losses, one.evaluation], [*other.losses, other.evaluation], strict=True)
    assert one.weights.keys() == other.weights.keys()
    weights = ((one.weights[k].double() - other.weights[k].double()).abs() for k in one.weights)
    return max(abs(a - b) for a, b in losses), max(float(d.max()) for d in weights)


def different_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that differ in any bit or are missing on one side."""
    different = [k for k in one if k not in other or not torch.equal(one[k], other[k])]
    return different + sorted(other.keys() - one.keys())

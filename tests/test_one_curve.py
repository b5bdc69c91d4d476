"""The same small run gives the same curve on every backend of this machine.

    python -m pytest -m nightly -s tests/test_one_curve.py

Twenty steps at learning rate 1e-3 without warm-up, with rows that halt at different steps: on one
CPU rank (the reference), in two micro-batches, on two ranks with DDP and with FSDP, on CUDA if
there is any, and on PyTorch/XLA if ATHENA_XLA_PYTHON names an interpreter that has it.
"""

import os
import re

import pytest
import torch

from scripts.gpu_checks.runs import BARS, RUN, STEPS, TINY, Way, apart, run, small_corpora
from utils.config.values import assignment


def all_ways() -> dict[str, Way]:
    """Return every way this machine has, the reference first."""
    ways = {
        "cpu x 1": Way("cpu"),
        "cpu x 1, 2 micro-batches": Way("cpu", ("grad_accum_steps=2",)),
        "cpu x 2, DDP": Way("cpu", (), 2),
        "cpu x 2, DDP, 2 micro-batches": Way("cpu", ("grad_accum_steps=2",), 2),
        "cpu x 2, FSDP": Way("cpu", ("parallel=fsdp",), 2),
    }
    if python := os.environ.get("ATHENA_XLA_PYTHON"):
        # the CPU's compiler at its lowest level: quick to compile, the same arithmetic
        env = (("PJRT_DEVICE", "CPU"), ("XLA_FLAGS", "--xla_backend_optimization_level=0"))
        ways["xla x 1 (on the CPU)"] = Way("xla", (), 1, python, env)
    for ranks in (1, 2):
        if torch.cuda.device_count() >= ranks:
            ways[f"cuda x {ranks}"] = Way("cuda", (), ranks)
    return ways


@pytest.mark.nightly
def test_all_ways_of_this_machine_give_one_curve(tmp_path):
    paths = assignment("data_paths", small_corpora(tmp_path / "corpora"))
    failures, reference = [], {}
    print(f"\n| {STEPS} steps | float32: losses differ by | float64: losses | weights |")
    print("|---|---|---|---|")
    # the last must be seen to differ
    for name, way in (all_ways() | {"other": Way("cpu", ("lr=1.001e-3",))}).items():
        cells = [name]
        for dtype, bar in BARS.items():
            overrides = [paths, *TINY, *RUN, f"arch.forward_dtype={dtype}"]
            curve = run(way, overrides, tmp_path / re.sub(r"\W+", "_", f"{name} {dtype}"))
            reference.setdefault(dtype, curve)
            assert len(set(curve.steps)) >= 3, "rows halt at the same steps"
            losses, weights = apart(reference[dtype], curve)
            cells += [f"{losses:.1e}"] + ([f"{weights:.1e}"] if dtype == "float64" else [])
            if not max(losses, weights if dtype == "float64" else 0.0) <= bar:
                failures.append((name, dtype))
        print(f"| {' | '.join(cells)} |", flush=True)
    assert failures in ([("other", "float64")], [("other", "float32"), ("other", "float64")])

"""Runs to compare: the same training on XLA's CPU and on the plain CPU, in one process."""

from pathlib import Path

import torch
import torch_xla.debug.metrics as xla_metrics
from training_tools import contents, make_config, metrics_of

from pretrain import train
from utils.backend.base import Backend
from utils.backend.xla_replica import Replica

# This process as the only replica. Made before any backward pass on the CPU: autograd counts the
# devices once, at the first.
REPLICA = Replica()

TEXT = (
    "arch.puzzle_emb_ndim=32",
    "puzzle_emb_lr=1e-2",
    "arch.halt_max_steps=5",
    "ema_rate=0.9",
    "epochs=40",
    "evaluators=[]",
    "eval_max_batches=1",
    "grad_clip_norm=0.5",
    "keep_checkpoints=null",
)


def run_on(backend: Backend, corpus: Path, folder: Path, *overrides: str) -> Path:
    """One training run; returns its folder."""
    config = make_config(corpus, f"checkpoint_path={folder}", "run_name=test", *overrides)
    assert train(backend, config) == 0
    return folder


def compiled() -> int:
    """Programs compiled so far in this process."""
    data = xla_metrics.metric_data("CompileTime")
    return 0 if data is None else data[0]


def fallbacks() -> list[str]:
    """Operations that XLA left to the CPU so far: each is a wait, and a cut in the program."""
    return [name for name in xla_metrics.counter_names() if name.startswith("aten::")]


def apart(one: Path, other: Path) -> dict[str, float]:
    """Largest difference between two checkpoints' weights and averages."""
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys()
    found = {}
    for part in ("model/", "ema/", "carry_0/carry/latents/z_H", "carry_0/carry/halted"):
        names = [name for name in a if name.startswith(part)]
        found[part] = max(
            (a[name].double() - b[name].double()).abs().max().item() for name in names
        )
    return found


def differences(one: Path, other: Path, step: int) -> dict[str, float]:
    """Largest difference of each logged metric, and of the checkpoints after `step`."""
    found = {}
    for name in ("lm_loss", "q_halt_loss", "grad_norm", "steps", "examples"):
        a, b = (metrics_of(run, f"train/{name}") for run in (one, other))
        assert len(a) == len(b) > 0
        found[name] = max(abs(x - y) for x, y in zip(a, b, strict=True))
    return found | apart(one / f"step_{step}", other / f"step_{step}")


def unequal(one: Path, other: Path) -> list[str]:
    """Tensors of two checkpoints that are not the same bit for bit."""
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]

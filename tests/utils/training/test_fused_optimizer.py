"""The optimizer of the package adam-atan2: the real package, its CUDA kernel replaced by a float64
reference that, like the kernel, reads plain memory only."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from training_tools import TINY, contents, finish, start

from utils.training import state as train_state
from utils.training.optimizers import AdamATan2, create_optimizers, fused_adam_atan2

pytestmark = pytest.mark.slow

VERSION = "adam-atan2==0.0.3"
KERNEL = """
import numpy as np

def adam_atan2_cuda_impl_(params, grads, means, squares, steps, lr, beta1, beta2, weight_decay):
    for tensors in zip(params, grads, means, squares, steps, strict=True):
        memory = [tensor.detach().numpy() for tensor in tensors]  # as data_ptr: no subclass has it
        p, g, m, v, t = (array.astype(np.float64) for array in memory)
        p *= 1 - lr * weight_decay
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        p -= lr / (1 - beta1**t) * np.arctan2(m, np.sqrt(v) / np.sqrt(1 - beta2**t))
        memory[0][...], memory[2][...], memory[3][...] = p, m, v
"""
# What a GPU would choose, on the CPU.
ON_CPU = """
import sys
from functools import partial
sys.path.insert(0, {package!r})
import pretrain
from utils.training import state as train_state
train_state.create_optimizers = partial(
    lambda real, *args, **options: real(*args, **options | {{"device_type": "cuda"}}),
    train_state.create_optimizers,
)
pretrain.main()
"""
RUN = [
    "epochs=20", "max_steps=6", "checkpoint_interval=3", "keep_checkpoints=null", "evaluators=[]",
    "lr=1e-3", "ema_rate=0.9", "weight_decay=0.1", "optimizer=adam_atan2", "run_name=test",
]  # fmt: skip


@pytest.fixture(scope="session")
def package(tmp_path_factory) -> Path:
    """A folder with the package as pip builds it where torch is not at hand: without its kernel."""
    folder = tmp_path_factory.mktemp("adam_atan2")
    fetched = Path(sys.prefix) / "adam-atan2"  # by `make venv`
    if fetched.is_dir():
        shutil.copytree(fetched, folder, dirs_exist_ok=True)
    else:
        # no cache: a later installation for a GPU must not find a wheel without the kernel there
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-cache-dir", "--target"]
        command = [*pip, str(folder), VERSION]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            pytest.skip(f"pip cannot fetch {VERSION}: {done.stderr.strip().splitlines()[-1]}")
    (folder / "adam_atan2_backend.py").write_text(KERNEL, "utf-8")
    return folder


@pytest.fixture
def fused(package, monkeypatch):
    """Have runs in this process choose as they would on a GPU."""
    monkeypatch.syspath_prepend(str(package))
    as_on_gpu = lambda *args, **options: create_optimizers(  # noqa: E731
        *args, **options | {"device_type": "cuda"}
    )
    monkeypatch.setattr(train_state, "create_optimizers", as_on_gpu)


def largest_difference(one: Path, other: Path) -> float:
    """Of weights, moments and averages; not of step counts, which the plain one keeps in Python."""
    first, second = (
        {
            name: tensor
            for name, tensor in contents(checkpoint).items()
            if name.startswith(("model/", "optimizer/", "ema/")) and not name.endswith("/step")
        }
        for checkpoint in (one, other)
    )
    assert first.keys() == second.keys()
    return max((first[k].double() - second[k].double()).abs().max().item() for k in first)


def test_a_resumed_run_equals_one_that_never_stopped_and_the_plain_optimizer(
    text_corpus, run_training, monkeypatch, fused
):
    chosen = create_optimizers(
        "adam_atan2", torch.nn.Linear(2, 2), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
        decay_all=False, device_type="cuda",
    )  # fmt: skip
    assert not any(isinstance(optimizer, AdamATan2) for optimizer in chosen)
    whole = run_training(text_corpus, "whole", *RUN)
    parts = run_training(text_corpus, "parts", *RUN, f"resume={whole / 'step_3'}")
    assert largest_difference(whole / "step_6", parts / "step_6") == 0
    monkeypatch.undo()
    plain = run_training(text_corpus, "plain", *RUN)
    assert largest_difference(whole / "step_6", plain / "step_6") < 1e-6
    resumed = run_training(text_corpus, "resumed", *RUN, f"resume={whole / 'step_3'}")
    assert largest_difference(resumed / "step_6", plain / "step_6") < 1e-6


def test_sharded_weights_get_the_same_updates_and_resume(text_corpus, tmp_path, package):
    script = tmp_path / "as_on_gpu.py"
    script.write_text(ON_CPU.format(package=str(package)), "utf-8")
    options = [*TINY, *RUN, f"data_paths=[{text_corpus}]", "parallel=fsdp"]
    whole = tmp_path / "whole"
    runs = ((whole, script, ()), (tmp_path / "parts", script, (f"resume={whole / 'step_3'}",)),
            (tmp_path / "plain", "pretrain.py", ()))  # fmt: skip
    for run, program, more in runs:
        code, out, err = finish(
            start(*options, *more, f"checkpoint_path={run}", ranks=2, script=str(program))
        )
        assert code == 0, out + err
    assert largest_difference(whole / "step_6", tmp_path / "parts" / "step_6") == 0
    assert largest_difference(whole / "step_6", tmp_path / "plain" / "step_6") < 1e-6


def test_it_takes_a_closure_as_torch_expects(package, monkeypatch):
    monkeypatch.syspath_prepend(str(package))
    weight = torch.nn.Parameter(torch.ones(3))
    make = partial(
        create_optimizers, "adam_atan2", lr=0.01, betas=(0.9, 0.95), weight_decay=0.0,
        decay_all=True,
    )  # fmt: skip
    module = torch.nn.ParameterList([weight])
    (optimizer,) = make(module, device_type="cuda")
    assert not isinstance(optimizer, AdamATan2)

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (weight < 1).all()


def test_a_step_works_where_torch_has_renamed_its_check(package, monkeypatch, recwarn):
    """torch 2.11 has no `_cuda_graph_capture_health_check`; the package calls it at each step."""
    monkeypatch.syspath_prepend(str(package))
    optimizer = fused_adam_atan2()([weight := torch.nn.Parameter(torch.ones(3))], lr=0.01)
    weight.square().sum().backward()
    optimizer.step()
    assert not [str(w.message) for w in recwarn if "graph_capture" in str(w.message)]
    monkeypatch.delattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check", raising=False)
    optimizer.step()
    assert (weight < 1).all()

"""The optimizer of the package adam-atan2: the real package, its CUDA kernel replaced by a float64
reference that, like the kernel, reads plain memory only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_tools import ROOT, TINY, contents, finish, start

from models.base import Architecture
from utils.config.schema import OptimizerConfig
from utils.core.errors import UserError
from utils.training.optimizers import create_optimizers
from utils.training.optimizers.adam_atan2 import AdamATan2, fused_adam_atan2

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
RUN = [
    "epochs=20", "max_steps=6", "checkpoint_interval=3", "keep_checkpoints=null", "evaluators=[]",
    "lr=1e-3", "ema_rate=0.9", "weight_decay=0.1", "run_name=test",
]  # fmt: skip
FUSED = "optimizer={name: adam_atan2, fused: true}"  # what a GPU chooses by itself


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


def create(module: torch.nn.Module, **options) -> list[torch.optim.Optimizer]:
    named = OptimizerConfig(name="adam_atan2", **options)
    model = Architecture()
    model.net = module
    return create_optimizers(
        named, model, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, decay_all=True
    )


def test_a_resumed_run_equals_one_that_never_stopped_and_the_plain_optimizer(
    text_corpus, run_training, monkeypatch, package
):
    monkeypatch.syspath_prepend(str(package))
    (chosen,) = create(torch.nn.Linear(2, 2), fused=True)
    assert not isinstance(chosen, AdamATan2)
    whole = run_training(text_corpus, "whole", *RUN, FUSED)
    parts = run_training(text_corpus, "parts", *RUN, FUSED, f"resume={whole / 'step_3'}")
    assert largest_difference(whole / "step_6", parts / "step_6") == 0
    plain = run_training(text_corpus, "plain", *RUN)
    assert largest_difference(whole / "step_6", plain / "step_6") < 1e-6
    resumed = run_training(text_corpus, "resumed", *RUN, f"resume={whole / 'step_3'}")
    assert largest_difference(resumed / "step_6", plain / "step_6") < 1e-6


def test_sharded_weights_get_the_same_updates_and_resume(text_corpus, tmp_path, package):
    options = [*TINY, *RUN, f"data_paths=[{text_corpus}]", "parallel=fsdp"]
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{package}"}
    for run, more in (
        (whole, [FUSED]), (parts, [FUSED, f"resume={whole / 'step_3'}"]), (plain, [])
    ):  # fmt: skip
        process = start(*options, *more, f"checkpoint_path={run}", ranks=2, env=path)
        code, out, err = finish(process)
        assert code == 0, out + err
    assert largest_difference(whole / "step_6", parts / "step_6") == 0
    assert largest_difference(whole / "step_6", plain / "step_6") < 1e-6


def test_what_is_asked_for_and_does_not_load_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "adam_atan2", None)
    with pytest.raises(UserError, match=r"optimizer\.fused.*adam-atan2"):
        create(torch.nn.Linear(2, 2), fused=True)


def test_it_takes_a_closure_as_torch_expects(package, monkeypatch):
    monkeypatch.syspath_prepend(str(package))
    weight = torch.nn.Parameter(torch.ones(3))
    (optimizer,) = create(torch.nn.ParameterList([weight]), fused=True)
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

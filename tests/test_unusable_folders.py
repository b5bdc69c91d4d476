"""Folders that cannot be written, and seeds out of range: one sentence where they matter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_tools import TINY

from dataset.build_corpus_dataset import parse_args as corpus_arguments
from dataset.build_sudoku_dataset import main as build_sudoku
from dataset.inspect_corpus import main as inspect_corpus
from utils.config.load import compose_config, load_config
from utils.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def unwritable(tmp_path):
    """A folder that even root cannot write to."""
    folder = tmp_path / "unwritable"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)]
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
    elif subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root may write everywhere, and nothing can be mounted")
    else:
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def pretrain(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "pretrain.py"), *TINY, "max_steps=1", "evaluators=[]",
         *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, encoding="utf-8", timeout=400,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    return done.stderr.split("error: ")[1]


@pytest.mark.slow
def test_runs_elsewhere_need_no_current_folder(text_corpus, unwritable, tmp_path):
    """One run, and a sweep, whose record Hydra would write to the current folder."""
    places = [f"data_paths=[{text_corpus}]", f"checkpoint_path={tmp_path}/run_${{seed}}"]
    nowhere = str(unwritable / "none")
    done = pretrain(unwritable, *places, TMPDIR=nowhere, HOME=nowhere)
    assert done.returncode == 0, done.stderr
    done = pretrain(unwritable, *places, "-m", "seed=1,2", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert str(unwritable) in done.stderr and str(tmp_path) in done.stderr
    assert all((tmp_path / f"run_{seed}" / "step_1").is_dir() for seed in range(3))
    sentence = refused(pretrain(unwritable, f"data_paths=[{text_corpus}]", "run_name=x"))
    assert "checkpoints/athena/x" in sentence and "checkpoint_path" in sentence


@pytest.mark.parametrize("seed", ["-1", str(2**64)])
def test_seeds_that_no_generator_takes(seed, capsys, tmp_path):
    with pytest.raises(UserError, match=f"seed.*{seed}") as error:
        load_config(compose_config([*TINY, "data_paths=[x]", f"seed={seed}"]))
    assert seed == "-1" or str(2**64 - 1) in str(error.value)
    for command, options in (
        (build_sudoku, ["--output-dir", str(tmp_path / "x"), "--size", "4", "--num-train", "2"]),
        (corpus_arguments, ["--output-dir", "x", "--input-files", "y", "--tokenizer-json", "z"]),
        (inspect_corpus, ["x"]),
    ):
        with pytest.raises(SystemExit):
            command([*options, "--seed", seed])
        told = capsys.readouterr().err
        assert "--seed" in told and seed in told and str(2**64 - 1) in told


def test_the_largest_seed_works(text_corpus, run_training):
    run = run_training(text_corpus, "run", "max_steps=1", "evaluators=[]", f"seed={2**64 - 1}")
    assert (run / "step_1").is_dir()

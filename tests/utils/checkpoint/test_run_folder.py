"""Folders of runs: names of those that have none, and starts that fail."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from training_tools import make_config

from utils.backend.cpu import CPUBackend
from utils.checkpoint.run_folder import LOCK, RunFolder
from utils.core.errors import UserError


@pytest.fixture
def unnamed(tmp_path, monkeypatch):
    """Open the folder of a run without a name; return its path and its name."""
    monkeypatch.chdir(tmp_path)

    def open_run(launch: str | None, number: int = 0) -> tuple[Path, str | None]:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if launch is not None:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        backend = CPUBackend()
        backend.launch_number = number
        config = make_config(Path("corpus"))
        with RunFolder(config, backend) as folder:
            return folder.path, config.run_name

    return open_run


def test_each_start_is_a_new_run(unnamed):
    found = [unnamed(launch) for launch in (None, "none", None)]
    assert len(set(found)) == 3
    for path, name in found:
        assert path.is_dir() and path.name == name
        assert re.fullmatch(r"\d{4}-\d{4}-[0-9a-f]{4}", name)


def test_a_launcher_finds_its_run_again(unnamed):
    assert unnamed("job") == unnamed("job")
    assert len({unnamed("job"), unnamed("job", 1), unnamed("other")}) == 3


@pytest.mark.parametrize("existed", [False, True])
def test_a_start_that_fails_leaves_nothing(text_corpus, run_training, tmp_path, existed):
    place = tmp_path / "made" / "run"
    if existed:
        place.mkdir(parents=True)
    before = list(tmp_path.rglob("*"))
    for fault in ("load_checkpoint=none", "evaluators=[text@Nobody]"):
        with pytest.raises(UserError):
            run_training(text_corpus, "made/run", "max_steps=1", fault)
        assert list(tmp_path.rglob("*")) == before, fault
    run_training(text_corpus, "made/run", "max_steps=1", "evaluators=[]")
    with pytest.raises(UserError, match="resume=none"):
        run_training(text_corpus, "made/run", "max_steps=1", "resume=none")
    assert (place / "step_1").is_dir() and (place / "config.yaml").is_file()


def test_a_start_that_waits_for_one_that_fails_locks_the_folder(tmp_path):
    """The first removes the file that the second has opened in order to lock it."""
    config = make_config(Path("corpus"), f"checkpoint_path={tmp_path / 'run'}")
    with ThreadPoolExecutor(1) as pool:
        with suppress(UserError), RunFolder(config, CPUBackend()):
            second = pool.submit(RunFolder, config, CPUBackend())
            time.sleep(0.3)
            raise UserError("no corpus")
        with second.result(timeout=20) as folder:
            assert (folder.path / LOCK).is_file()


def test_an_evaluation_that_fails_leaves_a_training_run_alone(tmp_path):
    """The training run began after the evaluation had made the directory."""
    keys = [f"checkpoint_path={tmp_path / 'run'}"]
    evaluation = make_config(Path("corpus"), *keys, "eval_only=true", "load_checkpoint=none")
    with suppress(UserError), RunFolder(evaluation, CPUBackend()):
        training = RunFolder(make_config(Path("corpus"), *keys), CPUBackend())
        raise UserError("no checkpoint")
    with training:
        assert (tmp_path / "run" / LOCK).is_file()

"""Names of runs that have none."""

import re
from pathlib import Path

import pytest
from training_tools import make_config

from utils.backend.cpu import CPUBackend
from utils.checkpoint.run_folder import RunFolder


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

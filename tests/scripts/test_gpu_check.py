"""scripts/gpu_check.py without a GPU: every part runs, and one that fails ends no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import gpu_check

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
# Stands in for all parts: reports a result, and ends the process as a library may.
CRASHING = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from scripts import gpu_check

def crash(session):
    with session.check("before") as found:
        found["value"] = 1
    print("a last sign", flush=True)
    os._exit(7)

gpu_check.__file__ = __file__
gpu_check.load = lambda part: crash
gpu_check.main()
"""


def check(folder: Path, *arguments: str, script: Path = SCRIPT) -> tuple[int, str, list[dict]]:
    """Return exit status, what is printed, and the results in the file."""
    output, env = folder / "results.jsonl", os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, str(script), *arguments, "--tiny", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=500, env=env)
    assert done.returncode < 2, done.stdout + done.stderr
    lines = output.read_text("utf-8").splitlines()
    return done.returncode, done.stdout, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    status, printed, found = check(tmp_path, "--seconds", "3000")
    assert [r for r in found if r["passed"] is False] == []
    assert status == 0, printed
    assert [r["part"] for r in found if r["check"] == "all"] == list(gpu_check.PARTS)
    for part in gpu_check.PARTS:
        assert len([r for r in found if r["part"] == part]) > 1, part
    for r in found:
        assert f"{r['part']}: {r['check']}" in printed
    assert not list(tmp_path.glob("athena_gpu_check_*")), "what it wrote on the way"


@pytest.mark.slow
def test_a_part_that_exceeds_its_limit_ends_and_the_next_one_runs(tmp_path):
    # shares of 0.2 s and 0.3 s, too little to import torch
    status, printed, found = check(tmp_path, "memory", "environment", "--seconds", "6")
    assert status == 1
    assert [(r["part"], r["passed"]) for r in found] == [("environment", False), ("memory", False)]
    assert all("limit" in r["problem"] for r in found)
    assert "environment, memory" in printed


@pytest.mark.slow
def test_a_part_that_crashes_keeps_its_results_and_shows_what_it_printed_last(tmp_path):
    script = tmp_path / "crashing.py"
    script.write_text(CRASHING, "utf-8")
    status, _, (before, whole) = check(tmp_path, "curve", script=script)
    assert status == 1
    assert (before["check"], before["value"], before["passed"]) == ("before", 1, None)
    assert whole["passed"] is False
    assert "status 7" in whole["problem"] and "a last sign" in whole["problem"]


def test_a_machine_without_a_gpu_and_an_unknown_part_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = ["--output", str(tmp_path / "results.jsonl")]
    for words, named in ((["curve"], "--tiny"), (["--tiny", "curves"], "curves")):
        with pytest.raises(SystemExit) as raised:
            gpu_check.main([*words, *output])
        assert raised.value.code == 2 and named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_part_has_a_limit_and_a_description(capsys):
    gpu_check.main(["--list", "--seconds", "960"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu_check.PARTS)
    assert sum(int(line.split()[1]) for line in lines) == 960
    assert all(len(line.split()) > 4 for line in lines)

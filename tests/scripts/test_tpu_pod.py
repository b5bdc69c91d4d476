"""scripts/tpu_pod.sh: what it would tell gcloud, and that those commands do what they say.

No pod is there: a `gcloud` on the path runs each worker's command in this machine's shell.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = str(ROOT / "scripts" / "tpu_pod.sh")
POD = ["--tpu", "my-pod", "--zone", "us-east5-a"]

GCLOUD = """#!/usr/bin/env bash
for argument; do
    case $argument in --command=*) cd "$HOME" && bash -c "${argument#--command=}" ;; esac
done
"""
# Stands for pretrain.py and its interpreter: notes its arguments, then waits to be stopped.
PYTHON = """#!/usr/bin/env bash
trap 'echo stopped >> fate; exit 143' TERM
printf '%s\\n' "$PJRT_DEVICE" "$@" > arguments.new && mv arguments.new arguments
while true; do sleep 0.1; done
"""


def pod(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SCRIPT, *arguments],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | environment,
        timeout=60,
    )


def test_help_names_every_command():
    done = pod("--help")
    assert done.returncode == 0
    for command in ("setup", "check", "run", "logs", "status", "stop", "kill"):
        assert f"\n  {command}" in done.stdout


@pytest.mark.parametrize("command", ["setup", "check", "run", "logs", "status", "stop", "kill"])
def test_a_dry_run_prints_commands_that_a_shell_reads_back(command):
    done = pod(*POD, "--project", "mine", "--dry-run", command)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace("gcloud ", "show gcloud ")
    program = "show() { printf '%s\\0' \"$@\"; }\n" + shown
    words = subprocess.run(["bash", "-c", program], capture_output=True, encoding="utf-8")
    words = words.stdout.split("\0")
    assert words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
    assert {"--zone=us-east5-a", "--project=mine"} <= set(words)
    assert "--worker=0" in words if command == "logs" else "--worker=all" in words
    for word in words:
        if word.startswith("--command="):
            remote = word.removeprefix("--command=")
            subprocess.run(["bash", "-n", "-c", remote], check=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--zone", "z", "stop"], "which TPU?"),
        (["--tpu", "t", "stop"], "in which zone?"),
        (POD, "which command?"),
        ([*POD, "start"], "unknown command start"),
        ([*POD, "stop", "now"], "stop takes no arguments, but got: now"),
        (["--pod", "x"], "unknown option --pod"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, sentence):
    done = pod(*arguments, TPU_NAME="", TPU_ZONE="")
    assert done.returncode == 2 and sentence in done.stderr


@pytest.fixture
def worker(tmp_path) -> dict[str, str]:
    """An environment in which gcloud reaches one worker, this machine with another home."""
    for path, text in ((tmp_path / "bin/gcloud", GCLOUD),
                       (tmp_path / "athena/.venv-tpu/bin/python", PYTHON)):  # fmt: skip
        path.parent.mkdir(parents=True)
        path.write_text(text, "utf-8")
        path.chmod(0o755)
    return {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("command", "fate"), [("stop", True), ("kill", False)])
def test_a_run_starts_with_its_arguments_and_ends_when_told(command, fate, worker):
    folder = Path(worker["HOME"]) / "athena"
    arguments = ["data_paths=[/mnt/a b/c]", "run_name=it's", "logger=[jsonl,wandb]"]
    done = pod(*POD, "run", *arguments, **worker)
    assert "started" in done.stdout, done.stderr
    process = int((folder / "tpu_run.pid").read_text("utf-8"))
    try:
        wait_until((folder / "arguments").exists)
        seen = (folder / "arguments").read_text("utf-8").splitlines()
        assert seen == ["TPU", "pretrain.py", "device_type=tpu", *arguments]
        assert "alive already" in pod(*POD, "run", **worker).stdout
        assert "alive" in pod(*POD, "status", **worker).stdout
        pod(*POD, command, **worker)
        wait_until(lambda: "no run" in pod(*POD, "status", **worker).stdout)
        assert (folder / "fate").exists() == fate
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def wait_until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)

"""Real launchers: several nodes, restarts of dead ranks, and a launcher that dies itself."""

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_tools import ROOT, TEXT, contents, finish, metrics_of, start

from utils.checkpoint.format import checkpoints_of

pytestmark = pytest.mark.slow


def options(corpus: Path, run: Path, *more: str) -> list[str]:
    return [
        f"data_paths=[{corpus}]", f"checkpoint_path={run}", "run_name=x", "device_type=cpu", *TEXT,
        "epochs=null", "max_steps=20", "lr_warmup_steps=0", "lr=1e-3", "global_batch_size=8",
        "log_interval=1", "eval_max_batches=2", "arch.forward_dtype=float64", *more,
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen) -> None:
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text("utf-8").count("\n") >= steps):
        assert time.monotonic() < deadline and process.poll() is None, finish(process)
        time.sleep(0.05)


def ended(child: int) -> int:
    """The wait status of a child, which must end within two minutes."""
    deadline = time.monotonic() + 120
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the run did not end")
        time.sleep(0.05)


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in path.read_text("utf-8").split()]


def test_two_nodes_meet_and_train_as_one_rank_would(text_corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    code, out, err = finish(start(*options(text_corpus, one)))
    assert code == 0, out + err
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
             "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test",
             str(ROOT / "pretrain.py"), *options(text_corpus, two)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    for node in nodes:
        code, out, err = finish(node)
        assert code == 0, out + err
    for name in ("train/lm_loss", "eval/all/lm_loss"):
        pairs = zip(metrics_of(one, name), metrics_of(two, name), strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-9


def test_a_dead_rank_is_restarted_and_the_run_goes_on_under_its_name(text_corpus, tmp_path):
    """Without run_name: the restarted ranks must find the run that they were."""
    names = [o for o in options(text_corpus, tmp_path) if not o.startswith("checkpoint_path")]
    names = [o for o in names if o != "run_name=x"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--max-restarts=1", str(ROOT / "pretrain.py"), *names, "max_steps=400",
         "checkpoint_interval=5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("checkpoints/athena/*/step_*/manifest.json"))):
        assert time.monotonic() < deadline and process.poll() is None, finish(process)
        time.sleep(0.05)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, out + err
    (run,) = (tmp_path / "checkpoints" / "athena").iterdir()
    assert "resuming from" in out and run == found[0].parents[1]
    contents(run / "step_400")
    assert len(metrics_of(run, "train/lm_loss")) == 400, "each step stands there once"


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_save_and_leave_when_their_launcher_dies(ranks, text_corpus, tmp_path):
    run = tmp_path / "run"
    process = start(*options(text_corpus, run, "max_steps=100000"), ranks=ranks, torchrun=True)
    wait_for_steps(run, 5, process)
    ranks = ranks_of(process)
    process.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()], "ranks go on unseen"
    (saved,) = checkpoints_of(run)
    contents(saved)
    process.communicate()


def test_a_run_is_not_started_twice_at_a_time(text_corpus, tmp_path):
    run = tmp_path / "run"
    first = start(*options(text_corpus, run, "max_steps=100000"))
    wait_for_steps(run, 3, first)
    code, out, err = finish(start(*options(text_corpus, run, "max_steps=100000")))
    assert code == 2, out + err
    assert f"process {first.pid} on" in err and "is training the run in" in err
    first.send_signal(signal.SIGINT)
    code, out, err = finish(first)
    assert code == 128 + signal.SIGINT, out + err
    assert len(checkpoints_of(run)) == 1


def test_a_run_whose_terminal_is_closed_saves_and_leaves(text_corpus, tmp_path):
    """A lost connection: SIGHUP comes, and nothing can be written to the terminal any more."""
    run = tmp_path / "run"
    child, terminal = pty.fork()  # the child leads a session that the terminal controls
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run below nohup
        os.chdir(ROOT)
        command = [sys.executable, "pretrain.py", *options(text_corpus, run, "max_steps=100000")]
        os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text("utf-8").count("\n") >= 5):
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)  # or the child waits for a reader
    os.close(terminal)
    status = ended(child)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    (saved,) = checkpoints_of(run)
    contents(saved)


def test_nohup_lets_a_run_go_on(text_corpus, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        ["nohup", sys.executable, "pretrain.py", *options(text_corpus, run, "max_steps=60")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for_steps(run, 3, process)
    process.send_signal(signal.SIGHUP)
    code, out, err = finish(process)
    assert code == 0 and "finished at step 60" in out, out + err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_an_evaluation_ends_the_run_without_waiting_for_it(
    number, text_corpus, tmp_path
):
    run, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text(
        "import time\nfrom pathlib import Path\nimport pretrain\nimport evaluators.loop as loop\n"
        "real = loop.run_batch\n"
        "def slow(*args):\n"
        f"    Path({str(tmp_path / 'evaluating')!r}).touch()\n"
        "    time.sleep(1)\n    return real(*args)\n"
        "loop.run_batch = slow\npretrain.main()\n",
        "utf-8",
    )
    more = ("eval_max_batches=100", "eval_batch_size=2", "max_steps=4")
    process = start(*options(text_corpus, run)[:-1], *more, script=str(script))
    deadline = time.monotonic() + 60
    while not (tmp_path / "evaluating").exists():
        assert time.monotonic() < deadline and process.poll() is None, finish(process)
        time.sleep(0.05)
    begun = time.monotonic()
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number, out + err
    assert time.monotonic() - begun < 8, "the evaluation of many seconds was waited for"
    assert [folder.name for folder in checkpoints_of(run)] == ["step_4"]
    assert not metrics_of(run, "eval/all/lm_loss")

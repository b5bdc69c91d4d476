"""The real `torch_xla.launch`, in processes of their own: this one has touched the device."""

import os
import signal
import time
from pathlib import Path

import pytest
from process_tools import in_background, start
from training_tools import TEXT, finish, metrics_of

from utils.checkpoint.format import Checkpoint, checkpoints_of

OPTIONS = [
    *TEXT, "device_type=xla", "global_batch_size=8", "epochs=1000", "evaluators=[]",
    "log_interval=1", "lr_warmup_steps=0", "run_name=x", "eval_max_batches=1",
]  # fmt: skip


@in_background
def test_sigterm_saves_and_the_same_command_goes_on(text_corpus, tmp_path):
    run = tmp_path / "run"
    command = ["pretrain.py", *OPTIONS, f"data_paths=[{text_corpus}]", f"checkpoint_path={run}"]
    process = start(*command, "max_steps=100000")
    deadline, log = time.monotonic() + 150, run / "metrics.jsonl"
    while not (log.is_file() and log.read_text("utf-8").count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None, finish(process)
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 128 + signal.SIGTERM, out + err
    (saved,) = checkpoints_of(run)
    Checkpoint(saved).verify()
    step = int(saved.name.removeprefix("step_"))
    assert f"after saving step {step}" in out + err
    assert "xla:0 on CPU" in out

    last = step + 2
    process = start(*command, f"max_steps={last}", "resume_allow=[max_steps]")
    code, out, err = finish(process)
    assert code == 0, out + err
    assert f"resuming from {saved}" in out and f"evaluation at step {last}" in out
    assert len(metrics_of(run, "train/lm_loss")) == last


@in_background
def test_a_mistake_that_only_replicas_can_see_ends_in_its_sentence(text_corpus, tmp_path):
    """How many replicas there are is known to them alone; here they are two threads."""
    process = start(
        "pretrain.py", *OPTIONS, f"data_paths=[{text_corpus}]", f"checkpoint_path={tmp_path}",
        "global_batch_size=7", "eval_batch_size=3", CPU_NUM_DEVICES="2",
    )  # fmt: skip
    code, out, err = finish(process)
    assert code == 2, out + err
    assert "Traceback" not in out + err
    assert "global_batch_size 7 is not a multiple of 2 rank(s) x grad_accum_steps 1: use 6" in err
    assert "eval_batch_size 3 is not a multiple of 2 rank(s): use 2 or 4" in err


FATES = """
import os, sys, time
import utils.backend.xla as xla
from dataset.common import UserError

def gives_its_rank(replica, offset):
    assert offset == 7
    with replica.one_rank_at_a_time():
        return replica.rank, replica.world_size, replica.local_rank

def fails_while_the_other_waits(replica, kind):
    if replica.rank == 0:
        time.sleep(1000)
    raise {"sentence": UserError("too small"), "bug": KeyError("a bug")}[kind]

def dies(replica):
    os.kill(os.getpid(), 9)

def stands_still(replica):
    replica.end_now(4)

if __name__ == "__main__":
    xla.GRACE_SECONDS = 1.0
    backend = xla.XLABackend()
    print(backend.launch(gives_its_rank, 7))
    print(backend.launch(stands_still))
    for fn, *args in (
        (fails_while_the_other_waits, "sentence"), (fails_while_the_other_waits, "bug"), (dies,)
    ):
        begun = time.monotonic()
        try:
            backend.launch(fn, *args)
        except Exception as error:
            print(type(error).__name__, "|", str(error).replace("\\n", " "))
        assert time.monotonic() - begun < 60
"""


@in_background
def test_what_becomes_of_replicas_reaches_the_parent(text_corpus, tmp_path):
    script = tmp_path / "fates.py"
    script.write_text(FATES, "utf-8")
    code, out, err = finish(start(str(script), CPU_NUM_DEVICES="2"))
    assert code == 0, out + err
    value, status, sentence, bug, death = out.splitlines()
    assert status == "4", "the watchdog's"
    assert value == "(0, 2, 0)"
    assert sentence == "UserError | too small"
    assert bug.startswith("RuntimeError | a replica failed:") and "KeyError: 'a bug'" in bug
    assert "fails_while_the_other_waits" in bug, "the traceback does not say where"
    assert death.startswith("RuntimeError") and "replicas ended" in death


STUBBORN = """
import os, sys, time
from pathlib import Path
import utils.backend.xla as xla

def waits(replica, folder):
    with replica.signals() as received:
        (folder / "ready").write_text(str(os.getpid()))
        while not received:
            time.sleep(0.05)
        (folder / "told").write_text(str(received[0]))
        time.sleep(1000)

if __name__ == "__main__":
    xla.XLABackend().launch(waits, Path(sys.argv[1]))
"""


@in_background
def test_a_second_interrupt_ends_the_run_at_once(text_corpus, tmp_path):
    """The first is told to the replicas, even where Ctrl-C reaches their processes too."""
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN, "utf-8")
    process = start(str(script), str(tmp_path))
    deadline = time.monotonic() + 90
    wait_for(tmp_path / "ready", deadline)
    child = int((tmp_path / "ready").read_text("utf-8"))
    os.kill(child, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "told", deadline)
    assert (tmp_path / "told").read_text("utf-8") == str(int(signal.SIGINT))
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process, timeout=20)
    assert code != 0 and "KeyboardInterrupt" in err
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def wait_for(path: Path, deadline: float) -> None:
    while not path.exists() or not path.read_text("utf-8"):
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.1)


def test_torchrun_is_refused(monkeypatch):
    from utils.backend import select_backend
    from utils.backend.xla import UserError

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # what torchrun sets
    with pytest.raises(UserError, match=r"device_type=xla .* without torchrun"):
        select_backend("xla")


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"PJRT_DEVICE": "CPU"}, "PJRT_DEVICE=CPU selects another device"),
        ({"PJRT_DEVICE": ""}, "this machine has no TPU"),
        ({"PJRT_DEVICE": "TPU"}, "no TPU answer"),  # or not in time, on a busy machine
    ],
)
@pytest.mark.skipif(bool(list(Path("/dev").glob("accel*"))), reason="this machine has a TPU")
def test_a_tpu_is_never_replaced_by_the_cpu(environment, sentence, monkeypatch):
    from utils.backend import select_backend, xla
    from utils.backend.xla import TPUBackend, UserError

    monkeypatch.setattr(xla, "PROBE_SECONDS", 20.0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sentence in str(TPUBackend.missing())
    with pytest.raises(UserError, match=f"device_type=tpu was asked for, but .*{sentence[:12]}"):
        select_backend("tpu")

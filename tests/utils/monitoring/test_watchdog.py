"""A rank that stands still is named, with the place where it does."""

import os
import re
import signal
import time

import pytest
from test_faults import run_with
from training_tools import TEXT, finish, start

from utils.monitoring.watchdog import STALLED, Place, describe

IMPATIENT = """
import utils.monitoring.watchdog
from sequence_dataset import ConsumeFeed
utils.monitoring.watchdog.LEAST_SECONDS, utils.monitoring.watchdog._REPORT = 1.5, 0.5
import time
"""


@pytest.mark.slow
def test_a_rank_that_reads_slowly_is_named_with_the_place(text_corpus, tmp_path):
    fault = f"""{IMPATIENT}
def slow(self, *args):
    global steps
    steps += 1
    if rank == 1 and steps == 21:
        time.sleep(5)
    return real(self, *args)
steps, real, ConsumeFeed.next = 0, ConsumeFeed.next, slow
"""
    code, out = run_with(fault, tmp_path / "run", text_corpus, tmp_path, ranks=2)
    assert code == 0, out
    (line,) = [line for line in out.splitlines() if "warning: step 21 has taken" in line][:1]
    assert "rank 1 holds up the others" in line, line
    assert re.search(r"rank 1 is at sequence_dataset\.py:\d+ \(next\)", line), line
    assert re.search(r"rank 0 waits for other ranks at pretrain\.py:\d+ \(\w+\)", line), line


@pytest.mark.slow
def test_a_rank_that_never_comes_back_ends_the_run(text_corpus, tmp_path):
    fault = f"""{IMPATIENT}
def stuck(run, state):
    if rank == 1:
        time.sleep(600)
at[20] = stuck
"""
    run = tmp_path / "run"
    code, out = run_with(fault, run, text_corpus, tmp_path, "step_timeout=4", ranks=2)
    assert code != 0
    assert re.search(r"error: no sign of life for \d+ s in step 20; rank 1 holds up", out), out
    assert f"exitcode: {STALLED}" in out, "torchrun tells how its rank ended"
    code, out = run_with("", run, text_corpus, tmp_path, ranks=2)  # the same command goes on
    assert code == 0 and "resuming from" in out
    fault = f"""{IMPATIENT}
import evaluators.loop
def stuck(*args):
    time.sleep(600 if rank == 1 else 0)
    return real(*args)
real, evaluators.loop.run_batch = evaluators.loop.run_batch, stuck
"""
    options = ["step_timeout=4", "eval_only=true"]
    code, out = run_with(fault, run, text_corpus, tmp_path, *options, ranks=2)
    assert code != 0 and f"exitcode: {STALLED}" in out and "rank 1 holds up" in out, out


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_told_by_the_others(frozen, text_corpus, tmp_path):
    script, pids = tmp_path / "pids.py", tmp_path / "pids"
    pids.mkdir()
    script.write_text(
        f"{IMPATIENT}import os, pathlib, pretrain\n"
        f"pathlib.Path({str(pids)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "pretrain.main()\n",
        "utf-8",
    )
    run = tmp_path / "run"
    process = start(
        f"data_paths=[{text_corpus}]", f"checkpoint_path={run}", "run_name=x", "device_type=cpu",
        *TEXT, "epochs=null", "max_steps=100000", "lr_warmup_steps=0", "global_batch_size=8",
        "log_interval=1", "evaluators=[]", "step_timeout=6", ranks=2, script=str(script),
    )  # fmt: skip
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text("utf-8").count("\n") >= 10):
        assert time.monotonic() < deadline and process.poll() is None, finish(process)
        time.sleep(0.1)
    victim = int((pids / str(frozen)).read_text("utf-8"))
    os.kill(victim, signal.SIGSTOP)
    assert process.stdout is not None
    told = ""
    while "no sign of life" not in told and time.monotonic() < deadline + 60:
        told = process.stdout.readline()
    os.kill(victim, signal.SIGKILL)  # or the launcher gives it 30 s to end by itself
    assert f"rank {frozen} does not answer" in told
    assert finish(process)[0] != 0


def test_the_sentence_names_who_is_behind_when_all_wait():
    places = {
        0: Place(8, "a.py:1 (f)", True, 0.0),
        1: Place(7, "b.py:2 (g)", True, 0.0),
        2: Place(8, "a.py:1 (f)", True, 0.0),
    }
    told = describe(places, 3)
    assert told.startswith("rank 1 holds up the others")
    assert "rank 0, 2 waits for other ranks at a.py:1 (f), step 8" in told


def test_one_rank_alone_does_not_wait_for_others():
    place = {0: Place(8, "pretrain.py:1 (f)", True, 0.0)}
    told = describe(place, 1, on_device=True)
    assert "other ranks" not in told and "waits for its device at pretrain.py:1 (f)" in told
    assert describe(place, 1) == "rank 0 is at pretrain.py:1 (f), step 8"


def test_ranks_on_devices_may_wait_for_those():
    places = {rank: Place(8, "pretrain.py:1 (f)", True, 0.0) for rank in range(2)}
    assert "rank 0, 1 waits for other ranks or its device at" in describe(places, 2, on_device=True)


@pytest.mark.slow
def test_a_device_that_stands_still_is_told_of_a_single_rank(text_corpus, tmp_path):
    fault = f"""{IMPATIENT}
at[20] = lambda *_: setattr(torch.Tensor, "cpu", lambda tensor: time.sleep(600))
"""
    code, out = run_with(fault, tmp_path / "run", text_corpus, tmp_path, "step_timeout=4")
    assert code == STALLED, out
    (line,) = [line for line in out.splitlines() if "no sign of life" in line]
    assert "other ranks" not in line and "pretrain.py" in line, line

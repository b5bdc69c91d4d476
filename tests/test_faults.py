"""What happens to long runs: full disks, vanished folders, numbers that are none, plug-ins that
raise, servers that are away. None of it may lose the run, and none may pass in silence."""

import json
import subprocess
from pathlib import Path

import pytest
from training_tools import TEXT, contents, differing, finish, metrics_of, start

from utils.checkpoint.format import checkpoints_of

pytestmark = pytest.mark.slow

FAULT = """
import os, shutil, sys
from pathlib import Path
import torch
import pretrain
from utils.training.save import Saver

Saver.RETRY_SECONDS = 0
rank, real_batch = int(os.environ.get("RANK", 0)), pretrain.train_batch
at = {}  # step -> what happens before it

def train_batch(run, *args):
    at.get(run.state.step + 1, lambda *_: None)(run, run.state)
    return real_batch(run, *args)

pretrain.train_batch = train_batch
"""


def run_with(fault: str, run: Path, corpus: Path, tmp_path: Path, *options: str, ranks: int = 1,
             env: dict[str, str] | None = None,
             max_restarts: int = 0) -> tuple[int, str]:  # fmt: skip
    """A run to whose 40 steps `fault` does something; its exit status and what it printed."""
    script = tmp_path / "fault.py"
    script.write_text(f"{FAULT}\n{fault}\npretrain.main()\n", "utf-8")
    process = start(
        f"data_paths=[{corpus}]", f"checkpoint_path={run}", "run_name=x", "device_type=cpu", *TEXT,
        "epochs=null", "max_steps=40", "lr_warmup_steps=0", "global_batch_size=8", "log_interval=1",
        "checkpoint_interval=4", "eval_max_batches=2", *options, ranks=ranks, script=str(script),
        env=env, max_restarts=max_restarts,
    )  # fmt: skip
    code, out, err = finish(process)
    return code, out + err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


FILL = """
def fill(run, state):
    with open({disk!r} + f"/filler{{rank}}", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
at[10] = fill
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_up_and_is_cleared_costs_nothing(
    text_corpus, tmp_path, small_disk, ranks
):
    run = small_disk / "run"
    clear = f"at[30] = lambda *_: Path({str(small_disk)!r}, f'filler{{rank}}').unlink()\n"
    fault = FILL.format(disk=str(small_disk)) + clear
    code, out = run_with(fault, run, text_corpus, tmp_path, ranks=ranks)
    assert code == 0, out
    assert "warning: step 12 could not be saved" in out
    assert "the last good checkpoint is step_8" in out
    assert checkpoints_of(run)[-1].name == "step_40"
    fine = tmp_path / "fine"
    code, out = run_with("", fine, text_corpus, tmp_path, ranks=ranks)
    assert differing(fine / "step_40", run / "step_40") == []


def test_a_disk_that_stays_full_ends_with_the_last_good_checkpoint_named(
    text_corpus, tmp_path, small_disk
):
    run = small_disk / "run"
    fault = FILL.format(disk=str(small_disk)) + (
        "real = Saver.finish\nSaver.finish = lambda self, most, *a: real(self, min(most, 1), *a)\n"
    )
    code, out = run_with(fault, run, text_corpus, tmp_path)
    assert code == 3, out
    assert "step 40, the last, could not be saved" in out
    assert "the last good checkpoint is step_8" in out
    assert [folder.name for folder in checkpoints_of(run)] == ["step_4", "step_8"]
    assert not list(run.glob(".step*")), "what was half written takes the little space there is"
    for folder in checkpoints_of(run):
        contents(folder)


def test_a_part_that_one_rank_cannot_write_is_tried_again(text_corpus, tmp_path):
    fault = """
import errno
import utils.checkpoint.writer as writer
def refuse(value, path):
    if rank == 1 and ".step_8." in str(path):
        raise OSError(errno.EIO, "Input/output error", str(path))
    return real_save(value, path)
real_save, writer.save_tensors = writer.save_tensors, refuse
"""
    run = tmp_path / "run"
    code, out = run_with(fault, run, text_corpus, tmp_path, "keep_checkpoints=null", ranks=2)
    assert code == 0, out
    assert "step 8 could not be saved (rank 1: Input/output error" in out
    names = [folder.name for folder in checkpoints_of(run)]
    assert "step_8" not in names and names[0] == "step_4" and names[-1] == "step_40"
    assert {"step_9", "step_10", "step_11"} & set(names), "the next attempt should come at once"


def test_a_folder_that_vanishes_comes_back(text_corpus, tmp_path):
    run = tmp_path / "run"
    # renamed away at once: a removal file by file would race with the thread that thins checkpoints
    fault = f"at[18] = lambda *_: os.rename({str(run)!r}, {str(tmp_path / 'gone')!r})\n"
    code, out = run_with(fault, run, text_corpus, tmp_path)
    assert code == 0, out
    assert f"{run / 'metrics.jsonl'} was deleted" in out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert steps[0] == 18 and steps[-1] == 40
    contents(run / "step_40")


def test_a_nan_on_one_rank_is_skipped_on_all(text_corpus, tmp_path):
    run = tmp_path / "run"
    fault = """
def poison(run, state):
    if rank == 1:
        state.carries[0].latents["z_H"][0] = torch.nan
        state.carries[0].halted[0] = False
at[10] = poison
"""
    code, out = run_with(fault, run, text_corpus, tmp_path, ranks=2)
    assert code == 0, out
    assert "step 10: loss or gradient is not finite, update skipped" in out
    assert metrics_of(run, "train/nonfinite")[-1] == 1
    assert all(v.isfinite().all() for k, v in contents(run / "step_40").items() if "carry" not in k)


EVALUATOR = """
from evaluators.text import PerplexityEvaluator
def broken(self, *args):
    if rank == {rank}:
        raise ZeroDivisionError("on purpose")
    return real(self, *args)
real, PerplexityEvaluator.{method} = PerplexityEvaluator.{method}, broken
"""


@pytest.mark.parametrize("method", ["update_batch", "begin_eval", "result"])
def test_an_evaluator_that_fails_on_one_rank_costs_its_figures_only(text_corpus, tmp_path, method):
    run = tmp_path / "run"
    fault = EVALUATOR.format(rank=1, method=method)
    if method == "begin_eval":  # the constructor calls it too, and may
        fault += "made = []\nbroken_begin = PerplexityEvaluator.begin_eval\n" \
            "def once(self):\n    made.append(1)\n" \
            "    return real(self) if len(made) == 1 else broken_begin(self)\n" \
            "PerplexityEvaluator.begin_eval = once\n"  # fmt: skip
    code, out = run_with(
        fault, run, text_corpus, tmp_path, "eval_interval=0.3", "epochs=1",
        "early_stopping={metric: text/perplexity, patience: 1}", ranks=2,
    )  # fmt: skip
    assert "ZeroDivisionError: on purpose" in out and "rank 1" in out
    assert "evaluator PerplexityEvaluator failed" in out
    assert code != 0, "a part of the run is missing"
    assert metrics_of(run, "eval/evaluators_failed")[-1] == 1
    assert len(metrics_of(run, "eval/all/lm_loss")) >= 2
    assert not metrics_of(run, "eval/text/perplexity")
    contents(run / "step_40")


def test_an_evaluator_that_cannot_be_made_is_known_before_the_first_step(text_corpus, tmp_path):
    fault = """
from evaluators.text import PerplexityEvaluator
from dataset.common import UserError
def refuse(self, *args, **options):
    raise UserError("this evaluator needs what is not there")
PerplexityEvaluator.__init__ = refuse
"""
    code, out = run_with(fault, tmp_path / "run", text_corpus, tmp_path)
    assert code == 2 and "needs what is not there" in out and "Traceback" not in out
    assert not checkpoints_of(tmp_path / "run")


def test_a_logger_that_raises_costs_its_lines_only(text_corpus, tmp_path):
    fault = """
from utils.monitoring.loggers.tensorboard import TensorBoardLogger
def broken(self, metrics, step):
    if step > 3:
        raise ConnectionError("the server is away")
TensorBoardLogger.log = broken
"""
    run = tmp_path / "run"
    code, out = run_with(fault, run, text_corpus, tmp_path, "logger=[tensorboard,jsonl]")
    assert code == 0, out
    assert "logger tensorboard: ConnectionError: the server is away; step 4 is missing" in out
    assert out.count("the server is away") < 5
    assert len(metrics_of(run, "train/lm_loss")) == 40


def test_an_unreachable_wandb_leaves_the_run_offline(text_corpus, tmp_path):
    run = tmp_path / "run"
    env = {
        "WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "5",
    }  # fmt: skip
    code, out = run_with("", run, text_corpus, tmp_path, "logger=[jsonl,wandb]", env=env)
    assert code == 0, out
    assert "wandb cannot be reached" in out
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(metrics_of(run, "train/lm_loss")) == 40

"""What may change when a run is resumed: another global_batch_size, and whatever is offered."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from seeds import draw_rng
from training_tools import IDENTIFIERS, TEXT, contents, finish, make_config, metrics_of, start

import pretrain
from sequence_dataset import TrainStream
from tests.stream_tools import ids_of, joined, real_rows, write_corpus, write_trm
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora

SIZES = (8, 12, 6, 6, 2, 16)  # the fourth resumes without a saved carry


def test_every_row_is_finished_once_whatever_the_batch_size_becomes(tmp_path):
    """Rows that had not halted come again; those that had do not."""
    inputs = write_corpus(tmp_path / "c", 97, domains=("p", "q"))
    rng, finished, entered = draw_rng(), Counter(), []
    state: dict | None = None
    for size, steps in zip(SIZES, (5, 4, 3, 4, 5, 1000), strict=True):
        streams = [
            TrainStream(
                Corpora([tmp_path / "c"]), seed=3, epochs=1, global_batch_size=size,
                rank=rank, world_size=2, num_workers=rank,
            )
            for rank in range(2)
        ]  # fmt: skip
        if state is not None:
            for stream in streams:
                stream.load_state_dict(json.loads(json.dumps(state)), restart_held=True)
        held: list[bytes | None] = [None] * size
        halted = np.ones(size, bool)
        for step in range(steps):
            parts = [stream.next(step, halted) for stream in streams]
            if parts[0] is None:
                break
            batch = joined([micro for part in parts for micro in part])
            entered.append(batch)
            for slot in np.flatnonzero(real_rows(batch)):
                assert halted[slot]
                held[slot] = batch["inputs"][slot].tobytes()
            halted = rng.random(size) < 0.3
            for slot, row in enumerate(held):
                if row is None:
                    halted[slot] = True
                elif halted[slot]:
                    finished[row] += 1
                    held[slot] = None
        state = streams[0].state_dict()
        assert state == streams[1].state_dict()
        places = zip(state["held_places"], halted.tolist(), strict=True)
        state["held_places"] = [-1 if free else place for place, free in places]
        for stream in streams:
            stream.close()
    assert set(finished.values()) == {1} and len(finished) == 97
    assert ids_of(entered, inputs).total() > 97
    assert streams[0].examples_entered == 97 and streams[0].progress == 1.0


def test_full_batches_of_another_size_go_on_where_the_last_ended(tmp_path):
    """feed=present: as many rows in all, each once in an epoch."""
    write_trm(tmp_path / "c", [[1]] * 100)
    inputs = np.load(tmp_path / "c/train/all__inputs.npy")
    seen, state, progress = [], None, []
    for size, steps in ((8, 4), (12, 3), (6, 1000)):
        stream = TrainStream(
            Corpora([tmp_path / "c"]), seed=3, epochs=1, global_batch_size=size, feed="present"
        )
        if state is not None:
            stream.load_state_dict(state)
        for step in range(steps):
            batch = stream.next(step, np.ones(size, bool))
            if batch is None:
                break
            seen += batch
            progress.append(stream.progress)
        state = json.loads(json.dumps(stream.state_dict()))
    assert len(seen) == 4 + 3 + (100 - 32 - 36) // 6
    counts = ids_of(seen, inputs)
    assert set(counts.values()) == {1} and counts.total() > 100 - 6
    assert stream.progress == 1.0 and stream.total_steps == len(seen)


@pytest.fixture
def finished_rows(monkeypatch) -> Counter:
    """How often each row of a run in this process has halted."""
    counts: Counter[tuple[int, ...]] = Counter()
    real = pretrain.train_batch

    def train_batch(run, *args):
        found = real(run, *args)
        for carry in run.state.carries:
            rows = carry.current_data["inputs"][carry.halted]
            counts.update(tuple(row) for row in rows.tolist() if any(row))  # not of empty slots
        return found

    monkeypatch.setattr(pretrain, "train_batch", train_batch)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["true", "false"])
def test_a_run_of_other_batch_sizes_finishes_each_row_once(
    text_corpus, run_training, finished_rows, capsys, carry
):
    """8, then 12, then 6 rows in the middle of an epoch."""
    options = ["evaluators=[]", f"checkpoint_carry={carry}", "epochs=0.3", *IDENTIFIERS]
    allowed = "resume_allow=[global_batch_size,max_steps]"
    for size, stop in ((8, 4), (12, 7), (6, None)):
        run = run_training(
            text_corpus, "run", *options, f"global_batch_size={size}", allowed,
            f"max_steps={stop or 'null'}",
        )  # fmt: skip
    out = capsys.readouterr().out
    assert "global_batch_size is 12 and was 8" in out and "is 6 and was 12" in out
    rows = round(0.3 * Corpora([str(text_corpus)], "train").num_rows)
    assert set(finished_rows.values()) == {1} and finished_rows.total() == rows
    assert metrics_of(run, "train/examples")[-1] == rows
    rates = metrics_of(run, "train/lr")[7:]  # of the run as it goes to its end
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(1e-4, rel=0.2)


def test_finished_rows_stay_so_where_the_saved_carry_is_not_wanted(
    text_corpus, run_training, finished_rows
):
    options = ["evaluators=[]", "arch.halt_max_steps=1", "resume_allow=[max_steps]"]
    run_training(text_corpus, "run", *options, "max_steps=2")
    run_training(text_corpus, "run", *options, "max_steps=4", "checkpoint_carry=false")
    assert set(finished_rows.values()) == {1} and finished_rows.total() == 32


RECORDING = """
import json, os, sys
import pretrain

path, real = sys.argv.pop(1), pretrain.train_batch

def train_batch(run, *args):
    found = real(run, *args)
    with open(f"{path}.{os.environ['RANK']}", "a", encoding="utf-8") as file:
        for carry in run.state.carries:
            for row in carry.current_data["inputs"][carry.halted].tolist():
                file.write(json.dumps(row) + "\\n" if any(row) else "")
    return found

pretrain.train_batch = train_batch
pretrain.main()
"""


@pytest.mark.slow
def test_two_ranks_go_on_with_another_batch_size(text_corpus, tmp_path):
    run, script = tmp_path / "run", tmp_path / "recording.py"
    script.write_text(RECORDING, "utf-8")
    options = [
        f"data_paths=[{text_corpus}]", *TEXT, "run_name=x", "device_type=cpu", "epochs=0.5",
        "lr=1e-3", "lr_warmup_steps=0", "log_interval=1", "evaluators=[]",
        f"checkpoint_path={run}", "resume_allow=[global_batch_size,max_steps]",
    ]  # fmt: skip
    for size, stop in ((8, "4"), (12, "8"), (6, "null")):
        given = [str(tmp_path / "rows"), f"global_batch_size={size}", f"max_steps={stop}"]
        process = start(given[0], *options, *given[1:], ranks=2, script=str(script))
        code, out, err = finish(process)
        assert code == 0, out + err
        assert size == 8 or f"global_batch_size is {size}" in out
    finished = Counter(
        line for file in tmp_path.glob("rows.*") for line in file.read_text("utf-8").splitlines()
    )
    rows = round(0.5 * Corpora([str(text_corpus)], "train").num_rows)
    assert set(finished.values()) == {1} and finished.total() == rows
    assert metrics_of(run, "train/examples")[-1] == rows


RESUMED = ["epochs=20", "evaluators=[]", "keep_checkpoints=null", *IDENTIFIERS]


@pytest.fixture(scope="module")
def ended(text_corpus, tmp_path_factory) -> Path:
    """A run of two steps, to be resumed by others."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    config = make_config(text_corpus, *RESUMED, "max_steps=2", f"checkpoint_path={folder}")
    assert pretrain.train(pretrain.select_backend("cpu")[0], config) == 0
    return folder / "step_2"


@pytest.mark.parametrize(
    "change",
    ["global_batch_size=4", "optimizer=muon", "freeze_weights=true", "ema=false",
     "arch.halt_max_steps=3", "weight_decay_all=true"],
)  # fmt: skip
def test_what_is_offered_works(text_corpus, run_training, ended, change):
    options = [*RESUMED, "max_steps=4", change, f"resume={ended}"]
    with pytest.raises(UserError) as error:
        run_training(text_corpus, "run", *options)
    (offered,) = re.findall(r"resume_allow=\[(.*?)\]", str(error.value))
    assert set(offered.split(",")) == {change.partition("=")[0], "max_steps"}
    run = run_training(text_corpus, "run", *options, f"resume_allow=[{offered}]")
    assert [path.name for path in checkpoints_of(run)] == ["step_4"]


@pytest.mark.parametrize(
    "change",
    ["seed=5", "feed=present", "domain_weights={poems: 1, lists: 2}", "arch.hidden_size=64",
     "arch.puzzle_emb_ndim=0"],
)  # fmt: skip
def test_what_cannot_work_is_not_offered(text_corpus, run_training, ended, change):
    key = change.partition("=")[0]
    options = [*RESUMED, "max_steps=2", f"resume={ended}", change, "puzzle_emb_lr=0.01"]
    with pytest.raises(UserError) as error:
        run_training(text_corpus, "run", *options, "lr=0.5")
    (offered,) = re.findall(r"resume_allow=\[(.*?)\]", str(error.value))
    assert offered == "lr" and key in str(error.value)
    if key.startswith("arch"):
        return
    assert f"load_checkpoint={ended}" in str(error.value)
    with pytest.raises(UserError, match=key):
        run_training(text_corpus, "run", *options, f"resume_allow=[{key}]")
    run_training(text_corpus, "other", *RESUMED, change, "max_steps=1", f"load_checkpoint={ended}")


def test_loss_options_are_allowed_by_the_names_that_they_had_before(
    text_corpus, run_training, ended
):
    changed = ["arch.loss.plateau_threshold=0.5", "arch.loss.label_smoothing=0.1"]
    options = [*RESUMED, "max_steps=3", f"resume={ended}", *changed]
    with pytest.raises(UserError, match=r"terms\.label_smoothing\.weight \(was None, is 0\.1\)"):
        run_training(text_corpus, "run", *options,
                     "resume_allow=[max_steps,arch.loss.plateau_threshold]")  # fmt: skip
    names = ",".join(key.partition("=")[0] for key in changed)
    run = run_training(text_corpus, "run", *options, f"resume_allow=[max_steps,{names}]")
    assert (run / "step_3").is_dir()


def test_the_length_of_held_rows_stays_though_arch_is_allowed(text_corpus, run_training, ended):
    options = [*RESUMED, "max_steps=2", f"resume={ended}", "arch.puzzle_emb_len=2"]
    with pytest.raises(UserError, match=r"arch\.puzzle_emb_len \(was .*, is 2\)"):
        run_training(text_corpus, "run", *options, "resume_allow=[arch]")


def test_averages_that_were_not_kept_begin_with_the_weights(text_corpus, run_training):
    options = [*RESUMED, "resume_allow=[ema,max_steps]"]
    run_training(text_corpus, "run", *options, "ema=false", "max_steps=2")
    run = run_training(text_corpus, "run", *options, "max_steps=3")
    before, after = contents(run / "step_2"), contents(run / "step_3")
    name = "inner.lm_head.weight"
    start_, end = (c[f"model/model.{name}"] for c in (before, after))
    average = Checkpoint(run / "step_3").tensors("ema")["shadow"][f"model.{name}"]
    low, high = torch.minimum(start_, end), torch.maximum(start_, end)
    assert ((average >= low - 1e-7) & (average <= high + 1e-7)).all()

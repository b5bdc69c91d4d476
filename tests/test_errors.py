"""What a user sees who made a mistake: one sentence, no traceback, before a model is built."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_tools import ROOT, TINY, make_config, metrics_of

from dataset import build_corpus_dataset
from dataset.common import load_metadata
from models.losses import ACTLossHead
from pretrain import launch, main, train
from utils.backend.cpu import CPUBackend
from utils.config.load import compose_config
from utils.core.errors import UserError
from utils.corpus.data import open_data


def refused(capsys, monkeypatch, *arguments: str) -> str:
    """Runs the real entry point; the sentence on stderr."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    monkeypatch.setattr(ACTLossHead, "__init__", lambda *a, **k: pytest.fail("a model was built"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.split("error: ", 1)[1].strip()


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["lrr=1"], ["lrr", "'lr'"]),
        (["arch.hiden_size=4"], ["arch.hiden_size", "arch.hidden_size"]),
        (["lr=fast"], ["lr", "fast"]),
        (["arch.num_heads=5"], ["hidden_size=32", "num_heads=5"]),
        (["global_batch_size=6", "grad_accum_steps=4"], ["6", "4"]),
        (["experiment=nothing"], ["nothing", "quickstart"]),
        (["device_type=cuda"], ["cuda", "device_type=auto"]),
        (["device_type=tpu"], ["torch_xla is not installed", "TPU_SETUP.md"]),
        (["parallel=fsdp", "optimizer=muon"], ["fsdp", "muon", "ddp"]),
        (["resume=no/such"], ["no/such"]),
        (["early_stopping={metric: x, patience: 0}"], ["patience"]),
    ],
)
def test_mistakes_in_the_config(text_corpus, arguments, needed, capsys, monkeypatch):
    if arguments == ["device_type=cuda"]:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    sentence = refused(capsys, monkeypatch, *TINY, f"data_paths=[{text_corpus}]", *arguments)
    for part in needed:
        assert part in sentence, sentence


def test_a_missing_corpus(capsys, monkeypatch):
    sentence = refused(capsys, monkeypatch, *TINY, "data_paths=[data/nowhere]", "device_type=cpu")
    assert "data/nowhere" in sentence and "\n" not in sentence


@pytest.mark.parametrize("null", ["experiment=null", "debug=null"])
def test_null_takes_a_group_away(null, text_corpus):
    assert compose_config([*TINY, f"data_paths=[{text_corpus}]", null]).lr == 1e-3


@pytest.fixture
def copied(text_corpus, tmp_path) -> Path:
    return Path(shutil.copytree(text_corpus, tmp_path / "copy"))


@pytest.fixture
def build_other(text_corpus, tmp_path) -> Path:
    """A corpus of the same tokenizer with a domain, and so an identifier, more."""
    (tmp_path / "other.txt").write_text("some other lines\nand more of them\n" * 40, "utf-8")
    options = [
        *("--tokenizer-json", str(text_corpus / "tokenizer.json")),
        *("--input-files", str(tmp_path / "other.txt"), "--dedup", "none"),
        *("--output-dir", str(tmp_path / "other"), "--train-ratio", "1"),
        *("--seq-len", str(load_metadata(text_corpus / "train" / "all").seq_len)),
    ]
    build_corpus_dataset.main(options)
    return tmp_path / "other"


def opening(corpus: Path) -> str:
    with pytest.raises(UserError) as error:
        open_data(make_config(corpus))
    return str(error.value)


def test_a_damaged_array(copied):
    path = copied / "train" / "all" / "labels.npy"
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    assert "labels.npy" in opening(copied)


def test_a_truncated_array(copied):
    path = copied / "train" / "all" / "inputs.npy"
    path.write_bytes(path.read_bytes()[:-100])
    assert "inputs.npy" in opening(copied)


def test_more_arrays_than_files_may_be_open(copied):
    """The limit of macOS is 256; the arrays are whole."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"\.npy: Too many open files.*ulimit"):
            open_data(make_config(copied))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_missing_array(copied):
    (copied / "train" / "all" / "inputs.npy").unlink()
    assert "inputs" in opening(copied)


def test_a_tokenizer_that_does_not_belong_to_the_corpus(copied):
    path = copied / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 999, "content": "<x>"})
    path.write_text(json.dumps(tokenizer), "utf-8")
    assert "tokenizer.json has 301 token ids" in opening(copied)


def test_two_corpora_with_different_tokenizers(text_corpus, copied):
    path = copied / "tokenizer.json"
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")
    with pytest.raises(UserError, match="differ"):
        open_data(make_config(text_corpus, f"data_paths_test=[{copied}]"))


def test_a_tokenizer_that_is_missing_from_one_of_two(text_corpus, copied):
    (copied / "tokenizer.json").unlink()
    open_data(make_config(copied))
    with pytest.raises(UserError, match=f"{copied} has no tokenizer.json"):
        open_data(make_config(text_corpus, f"data_paths_test=[{copied}]"))


def test_test_corpora_that_are_not_there(text_corpus, tmp_path):
    for wrong, why in (
        (tmp_path / "nowhere", "does not exist"),
        (text_corpus / "tokenizer.json", "exists but must be a directory"),
        (text_corpus / "train", "is part of a corpus"),
    ):
        with pytest.raises(UserError, match=f"{wrong} {why}") as error:
            open_data(make_config(text_corpus, f"data_paths_test=[{wrong}]"))
        assert len(str(error.value)) < 300


def test_a_run_folder_that_cannot_be_written_to(text_corpus):
    with pytest.raises(UserError, match=r"cannot write to the run's folder /proc/x .*checkpoint_"):
        launch(compose_config([*TINY, f"data_paths=[{text_corpus}]", "checkpoint_path=/proc/x"]))


def test_going_on_with_another_corpus_names_the_corpus(text_corpus, build_other, run_training):
    run_training(text_corpus, "run", "max_steps=1", "evaluators=[]")
    with pytest.raises(UserError, match=f"{build_other}.*load_checkpoint"):
        run_training(text_corpus, "run", "max_steps=1", "evaluators=[]",
                     f"data_paths=[{text_corpus},{build_other}]")  # fmt: skip


def test_an_empty_test_split_skips_evaluation_with_one_sentence(copied, tmp_path, capsys):
    shutil.rmtree(copied / "test")
    run = [f"checkpoint_path={tmp_path}/run", "max_steps=1"]
    launch(compose_config([*TINY, f"data_paths=[{copied}]", *run]))
    assert "evaluation is skipped" in capsys.readouterr().out


def test_evaluating_on_nothing_is_an_error(copied, text_run, tmp_path):
    shutil.rmtree(copied / "test")
    place = f"checkpoint_path={tmp_path}/made/run"
    run = ["eval_only=true", f"load_checkpoint={text_run}", place]
    config = make_config(copied, *run, "arch.loss.loss_type=stablemax_cross_entropy")
    with pytest.raises(UserError, match=r"copy .*data_paths_test"):
        train(CPUBackend(), config)
    assert not (tmp_path / "made").exists()


def test_an_evaluation_that_fails_leaves_only_what_was_there(text_corpus, text_run, tmp_path):
    """No folder where there was none, and each file of one that was there."""

    def evaluate(place: Path, *more: str) -> None:
        given = ["eval_only=true", f"load_checkpoint={text_run}", f"checkpoint_path={place}"]
        given += ["arch.loss.loss_type=stablemax_cross_entropy", "eval_max_batches=1"]
        train(CPUBackend(), make_config(text_corpus, *given, *more))

    made, own = tmp_path / "made" / "run", tmp_path / "own"
    own.mkdir()
    (own / "notes.txt").write_text("", "utf-8")
    task = "{name: tasks@MultipleChoiceEvaluator, path: %s}"
    faults = [f"evaluators=[{task % (tmp_path / 'none.jsonl')}]", f"load_checkpoint={own}"]
    for fault in [*faults, "seq_len=9"]:
        for place in (made, own):
            with pytest.raises(UserError):
                evaluate(place, fault)
        assert not (tmp_path / "made").exists(), fault
        assert (own / "notes.txt").exists(), fault
    evaluate(made)
    assert metrics_of(made, "eval/text/bits_per_byte")


def test_early_stopping_without_a_test_split_is_refused_before_the_first_step(copied, tmp_path):
    shutil.rmtree(copied / "test")
    run = [f"checkpoint_path={tmp_path}/run", "early_stopping={metric: loss}", "eval_interval=0.1"]
    with pytest.raises(UserError, match=r"early_stopping.*loss.*data_paths_test"):
        launch(compose_config([*TINY, f"data_paths=[{copied}]", *run]))
    assert not list((tmp_path / "run").glob("step_*"))


def test_new_run_in_the_folder_of_an_old_one(text_corpus, run_training):
    run_training(text_corpus, "run", "max_steps=1", "evaluators=[]")
    with pytest.raises(UserError, match="resume=none"):
        run_training(text_corpus, "run", "max_steps=1", "evaluators=[]", "resume=none")


def test_dry_run_counts_the_large_preset(capsys):
    """The cost is told before the start: 210 layer passes a step, up to 10,080 a token; the core
    is what the name says, and no head is there that nothing trains."""
    sizes = ["vocab_size=32000", "seq_len=2048"]
    launch(compose_config(["arch=athena_trm_large", "dry_run=true", *sizes]))
    printed = capsys.readouterr().out
    core, heads = (
        float(re.search(rf"^  {part} +([\d.]+) M", printed, re.MULTILINE)[1])
        for part in ("core", "output head")
    )
    assert 250 <= core <= 330
    assert heads == pytest.approx(2304 * 32000 / 1e6, rel=1e-3)
    assert "210 per ACT step" in printed and "10,080" in printed
    assert re.search(r"^rows at once +\d+ of 768, .* GB free", printed, re.MULTILINE)


@pytest.mark.slow
def test_the_entry_point_in_a_process_of_its_own(tmp_path):
    """As typed, from another folder; torch must not be needed for the answer to be quick."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "pretrain.py"), "lrr=1"],
        capture_output=True, encoding="utf-8", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    assert "did you mean 'lr'?" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_arrays_of_the_corpus_use_the_smallest_dtype(text_corpus):
    assert np.load(text_corpus / "train" / "all" / "inputs.npy").dtype == np.uint16

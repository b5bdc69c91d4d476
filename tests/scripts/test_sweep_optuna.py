"""A search over real runs: values lie where the sweeps say, it goes on, and mistakes end it."""

import json
import re
import shutil
import sys

import pytest
from training_tools import TINY

pytest.importorskip("optuna")
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.trial import FixedTrial

from scripts.sweep_optuna import main, suggest

pytestmark = pytest.mark.slow

SWEEP = "tag(log, interval(1e-4, 1e-1))"


def trials_of(folder):
    lines = (folder / "trials.jsonl").read_text("utf-8").splitlines()
    return {line["trial"]: line for line in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("sweep", "value", "given"),
    [
        ("lr=interval(0.1, 2)", 0.5, "lr=0.5"),
        ("seed=interval(1, 9)", 7, "seed=7"),
        ("seed=range(1, 9, 3)", 4, "seed=4"),
        ("optimizer=adamw,muon", "muon", "optimizer=muon"),
        ("arch=choice(trm, transformer)", "trm", "arch=trm"),
        ("data_paths=[a],[b,c]", "[b,c]", "data_paths=[b,c]"),
    ],
)
def test_sweeps_are_those_of_hydra(sweep, value, given):
    (override,) = OverridesParser.create().parse_overrides([sweep])
    assert suggest(FixedTrial({override.key_or_group: value}), override) == given


def test_a_search_finds_and_goes_on(text_corpus, tmp_path, capsys):
    folder = tmp_path / "study"
    given = [
        "--folder", str(folder), "--startup-trials", "1", *TINY,
        f"data_paths=[{text_corpus}]", "max_steps=6", "epochs=9", "eval_interval=0.1",
        f"lr={SWEEP}", "optimizer=adamw,adam_atan2",
    ]  # fmt: skip
    main([*given, "--trials", "2"])
    out = capsys.readouterr().out
    first = trials_of(folder)
    assert sorted(first) == [0, 1] and re.search(r"^best: lr=\S+ optimizer=\S+$", out, re.M)
    for number, trial in first.items():
        assert 1e-4 <= trial["lr"] <= 1e-1 and trial["optimizer"] in ("adamw", "adam_atan2")
        config = (folder / f"trial_{number}" / "config.yaml").read_text("utf-8")
        assert f"optimizer: {trial['optimizer']}" in config
        if trial["state"] == "COMPLETE":
            logged = (folder / f"trial_{number}" / "metrics.jsonl").read_text("utf-8").splitlines()
            evaluated = [json.loads(line) for line in logged if "eval/text/bits_per_byte" in line]
            assert trial["value"] == evaluated[-1]["eval/text/bits_per_byte"]
    main([*given, "--trials", "3"])
    out = capsys.readouterr().out
    assert "2 of 3 trials are done" in out
    with pytest.raises(SystemExit):
        main([*given, "--trials", "4", "optimizer=adamw,muon"])
    assert "contains a search with other keys" in capsys.readouterr().err
    assert trials_of(folder).keys() == {0, 1, 2} and first.items() <= trials_of(folder).items()


def test_a_trial_that_blows_up_is_one_trial(text_corpus, tmp_path, capsys):
    folder = tmp_path / "study"
    main([
        f"folder={folder}", *TINY, f"data_paths=[{text_corpus}]", "max_steps=20", "epochs=9",
        "max_nonfinite=1", "optimizer=adamw", "lr=1e-3,1e30", "trials=4", "search_seed=1",
    ])  # fmt: skip
    out = capsys.readouterr().out
    states = {trial["lr"]: trial["state"] for trial in trials_of(folder).values()}
    assert states["0.001"] == "COMPLETE" and "best: lr=0.001" in out
    assert states["1e+30"] == "FAIL"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lr=1e-3"], "no key is varied"),
        (["lr=interval(1,0.1)"], "lr=interval(1,0.1)"),
        (["lr=tag(log,interval(0,1))"], "lr=tag(log,interval(0,1))"),
        (["arch.L_layers=range(3,1)"], "arch.L_layers=range(3,1)"),
        (["lr=1,2", "launcher=nonexistent"], "launcher=nonexistent"),
        (["lr=interval(1,"], "at input 'interval(1,'"),
        (["run_name=a,b"], "run_name is set for each trial: use folder="),
        (["lr=1,2", "logger=[tensorboard]"], "does not write metrics.jsonl"),
        (["lr=1,2", "lr_find=true"], "lr_find"),
        (["lrr=1,2"], "unknown key 'lrr': did you mean 'lr'?"),
    ],
)
def test_mistakes_end_the_search(text_corpus, tmp_path, arguments, sentence, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([f"folder={tmp_path / 's'}", *arguments, f"data_paths=[{text_corpus}]"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_a_corpus_without_a_test_split_is_refused_before_anything_is_trained(
    text_corpus, tmp_path, capsys
):
    corpus = tmp_path / "corpus"
    shutil.copytree(text_corpus, corpus)
    shutil.rmtree(corpus / "test")
    with pytest.raises(SystemExit):
        main([f"folder={tmp_path / 's'}", "lr=1,2", f"data_paths=[{corpus}]"])
    assert f"data_paths={corpus} has no test split" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_mistake_can_be_corrected_and_one_bad_value_fails_its_own_trials(
    text_corpus, tmp_path, capsys
):
    folder = tmp_path / "s"
    given = [f"folder={folder}", *TINY, f"data_paths=[{text_corpus}]", "max_steps=2"]
    given += ["epochs=9", "arch.num_heads=2,3", "search_seed=1"]
    with pytest.raises(SystemExit):
        main([*given, "trials=6", "metric=eval/all/nope"])
    assert "metric=eval/all/nope was not evaluated; available" in capsys.readouterr().err
    main([*given, "trials=3", "metric=eval/all/lm_loss"])
    states = {(t["arch.num_heads"], t["state"]) for t in trials_of(folder).values()}
    assert states <= {("2", "COMPLETE"), ("2", "FAIL"), ("3", "FAIL"), ("2", "PRUNED")}
    assert ("2", "COMPLETE") in states
    with pytest.raises(SystemExit):
        main([*given, "trials=4", "metric=eval/all/accuracy"])
    assert "contains a search with other metric" in capsys.readouterr().err


def test_a_trial_that_diverges_at_its_end_has_no_figure(text_corpus, tmp_path, capsys):
    """The launcher stands for a run whose last evaluation is not finite."""
    script = tmp_path / "run.py"
    script.write_text(
        """import json, pathlib, sys
keys = dict(word.split("=", 1) for word in sys.argv[2:])
run = pathlib.Path(keys["checkpoint_path"])
run.mkdir(parents=True)
figures = [2.0, None] if float(keys["lr"]) > 0.5 else [4.0, 3.0]
lines = [json.dumps({"step": i, "eval/all/lm_loss": f}) for i, f in enumerate(figures)]
(run / "metrics.jsonl").write_text("\\n".join(lines) + "\\n")
""",
        "utf-8",
    )
    main([
        f"folder={tmp_path / 's'}", *TINY, f"data_paths=[{text_corpus}]", "lr=0.1,1.0",
        "trials=2", "metric=eval/all/lm_loss", f"launcher={sys.executable} {script}",
    ])  # fmt: skip
    trials = trials_of(tmp_path / "s").values()
    assert {(t["lr"], t["state"]) for t in trials} <= {("0.1", "COMPLETE"), ("1.0", "FAIL")}
    assert all(t["value"] == 3.0 for t in trials if t["state"] == "COMPLETE")

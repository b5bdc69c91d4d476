"""A sweep of the learning rate: its rates, what it says, and that it leaves runs alone."""

import json
import re

import numpy as np
import pytest
from seeds import draw_rng
from training_tools import TEXT, TINY, finish, make_config, metrics_of, start

from utils.checkpoint.format import checkpoints_of
from utils.config.schema import LRFindConfig
from utils.core.errors import UserError
from utils.training import lr_finder

SWEEP = "lr_find={low: 1e-5, high: 10, steps: 60}"


def test_findings_are_those_of_a_known_curve():
    rates = np.geomspace(1e-6, 1, 600)
    losses = 5 - 2 / (1 + np.exp(-6 * (np.log10(rates) + 3))) + np.maximum(0, rates - 0.1) * 9
    found = lr_finder.analyze(rates, losses)
    # a running mean of 10 steps lags behind by a tenth of a decade
    assert np.log10(found.steepest) == pytest.approx(-3, abs=0.15)
    assert np.log10(found.lowest) == pytest.approx(-1, abs=0.25)
    assert lr_finder.analyze(rates, np.linspace(5, 6, 600)) is None
    values = draw_rng().normal(size=20)
    mean = total = 0.0
    for value, expected in zip(values, lr_finder.running_mean(values), strict=True):
        mean, total = 0.9 * mean + 0.1 * value, 0.9 * total + 0.1
        assert expected == pytest.approx(mean / total)


@pytest.mark.slow
def test_a_sweep_takes_the_rates_it_names_and_keeps_nothing(text_corpus, tmp_path):
    """As a user: a run is there already, of the same name; the sweep has nothing to do with it."""
    given = [*TINY, f"data_paths=[{text_corpus}]", f"checkpoint_path={tmp_path}", "max_steps=2"]
    assert finish(start(*given))[0] == 0
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for _ in range(2):  # a second sweep starts anew
        code, out, err = finish(start(*given, SWEEP))
        assert code == 0, out + err
    assert "falls fastest at lr" in out and "try lr=" in out
    folder = tmp_path / "lr_find"
    assert metrics_of(folder, "train/lr") == pytest.approx(np.geomspace(1e-5, 10, 60))
    assert len((folder / "lr_find.png").read_bytes()) > 10_000
    assert not checkpoints_of(folder) and not (folder / "evaluation.json").exists()
    left = [p for p in sorted(tmp_path.rglob("*")) if p.is_file() and folder not in p.parents]
    assert left == before


@pytest.mark.slow
def test_ranks_sweep_alike(text_corpus, tmp_path):
    losses = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        code, out, err = finish(
            start(*TEXT, f"data_paths=[{text_corpus}]", f"checkpoint_path={run}", "device_type=cpu",
                  "global_batch_size=8", "arch.forward_dtype=float64",
                  "lr_find={high: 1e-2, steps: 12}", ranks=ranks)
        )  # fmt: skip
        assert code == 0, out + err
        assert out.count("lr_find.png") == 1
        losses.append(metrics_of(run / "lr_find", "train/lm_loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_a_sweep_ends_where_the_loss_is_no_longer_finite(tmp_path):
    rates = np.geomspace(1e-5, 1, 60)
    lines = [
        {"step": i + 1, "train/lr": rate, "train/lm_loss": 5 - 0.1 * i if i < 40 else None}
        for i, rate in enumerate([*rates[:40], rates[39]])
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), "utf-8"
    )
    rule = LRFindConfig(low=1e-5, high=1, steps=60)
    said = lr_finder.conclude(tmp_path, rule)
    assert f"no longer finite after lr {rates[39]:.2g}" in said and "lowest" in said
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[-1]) + "\n", "utf-8")
    assert "did not fall" in lr_finder.conclude(tmp_path, rule)


@pytest.mark.parametrize("turn", [1e-3, 1e-2, 3e-2, 0.1, 1.0])
def test_the_advice_never_exceeds_its_own_limit(tmp_path, turn):
    """A loss that falls with the logarithm of the rate, faster until `turn` and then up."""
    rates = np.geomspace(1e-5, 0.1, 120)
    with (tmp_path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for i, rate in enumerate(rates):
            loss = 5 - (rate / 0.1) ** 0.5 + max(0.0, rate - turn) * 100
            file.write(json.dumps({"step": i + 1, "train/lm_loss": loss}) + "\n")
    said = lr_finder.conclude(tmp_path, LRFindConfig(low=1e-5, high=0.1, steps=120))
    advised = float(re.search(r"try lr=([\d.e+-]+)", said)[1])
    lowest = float(re.search(r"lowest at ([\d.e+-]+)", said)[1])
    limit = re.search(r"at most ([\d.e+-]+)", said)
    assert advised <= lowest / 2.9 and (limit is None or advised < float(limit[1]))
    assert ("raise lr_find.high (now 0.1)" in said) == (turn >= 0.1)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lr_find={low: 1, high: 0.1}"], r"lr_find\.low 1 must be below lr_find\.high 0\.1"),
        (["lr_find={lo: 1}"], r"unknown key 'lr_find\.lo'.*lr_find\.low"),
        (["lr_find={steps: 3}"], r"lr_find\.steps"),
        (["lr_find=true", "lr=0"], "lr_find sweeps lr.*lr=0"),
        (["lr_find=true", "dry_run=true"], "lr_find needs training, but dry_run=true"),
        (["lr_find=true", "resume=some/run"], "lr_find starts a new run"),
        (["profile=true", "eval_only=true", "load_checkpoint=x"], "profile needs training"),
    ],
)
def test_mistakes(text_corpus, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        make_config(text_corpus, *overrides)


def test_true_and_false_stand_for_the_defaults_and_none(text_corpus):
    assert make_config(text_corpus, "lr_find=true").lr_find == LRFindConfig()
    assert make_config(text_corpus, "lr_find=false").lr_find is None
    no_length = make_config(text_corpus, "lr_find=true", "epochs=null", "max_steps=null")
    assert lr_finder.configure_sweep(no_length).max_steps == LRFindConfig().steps

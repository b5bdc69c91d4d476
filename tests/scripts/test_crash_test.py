"""Short versions of what scripts/crash_test.py and scripts/one_curve.py show at length."""

import pytest
import torch

from scripts import crash_test, one_curve
from utils.core.errors import UserError


@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(2, 150, marks=pytest.mark.slow),
        pytest.param(100, 4000, marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_is_killed_ends_like_one_that_was_not(kills, steps, seed, tmp_path, capsys):
    options = {"--kills": kills, "--steps": steps, "--seed": seed, "--output-dir": tmp_path / "out"}
    crash_test.main([str(word) for pair in options.items() for word in pair])
    out = capsys.readouterr().out
    assert f"{kills} kills" in out and ": 0 differ" in out


def test_a_single_different_number_is_seen():
    one = {"model/a": torch.zeros(3), "ema/b": torch.ones(2)}
    crash_test.compare(one, {name: value.clone() for name, value in one.items()})
    with pytest.raises(UserError, match="ema/b"):
        crash_test.compare(one, one | {"ema/b": torch.tensor([1.0, 1.0 + 1e-7])})
    with pytest.raises(UserError, match="model/a"):
        crash_test.compare(one, {"ema/b": one["ema/b"]})


@pytest.mark.nightly
def test_all_ways_of_this_machine_give_one_curve(tmp_path, capsys):
    one_curve.main(["--output-dir", str(tmp_path / "curve")])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cpu")]
    assert len(rows) == 5


@pytest.mark.nightly
def test_a_way_that_trains_otherwise_is_seen(tmp_path, monkeypatch, capsys):
    ways = {"cpu x 1": one_curve.Way("cpu"), "other": one_curve.Way("cpu", ("lr=1.001e-3",))}
    monkeypatch.setattr(one_curve, "ways", lambda xla_python: ways)
    with pytest.raises(SystemExit):
        one_curve.main(["--output-dir", str(tmp_path / "curve")])
    assert "other in float64: losses" in capsys.readouterr().err

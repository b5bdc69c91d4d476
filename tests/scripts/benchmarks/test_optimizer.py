"""The benchmark of an update: it compares results too, so a difference would be seen there."""

import re

from scripts.benchmarks.optimizer import main


def test_every_optimizer_is_compared_with_plain_loops(capsys):
    main(["width=16", "rounds=2", "device_type=cpu", "lr=1e-3"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [name for name, *_ in lines] == ["adam_atan2", "adamw", "muon"]
    for name, own, plain, ratio, apart in lines:
        assert float(own) > 0 and float(plain) > 0 and re.fullmatch(r"\d+\.\d\d", ratio)
        assert float(apart) < (1e-4 if name == "muon" else 1e-6)

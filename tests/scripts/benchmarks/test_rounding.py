"""scripts/benchmarks/rounding.py: the same model in three precisions, before and after training."""

import re

from scripts.benchmarks.rounding import measure

TINY = "arch=athena_trm_tiny arch.hidden_size=32 arch.num_heads=2 lr=1e-3 lr_warmup_steps=0".split()


def test_it_tells_how_far_rounding_goes(capsys):
    measure(TINY, updates=[0, 3], steps=2)
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines] == [0, 3]
    losses = [float(line.split()[1]) for line in lines]
    assert losses[1] != losses[0]
    for line in lines:
        float32, bfloat16 = (re.findall(r"(\de[-+]\d+) +(-?\d\.\d\d)", part)
                             for part in line.split("|"))  # fmt: skip
        assert len(float32) == len(bfloat16) == 2
        for (single, cosine), (half, _) in zip(float32, bfloat16, strict=True):
            assert 0 < float(single) < 1e-4 < float(half) and float(cosine) > 0.99

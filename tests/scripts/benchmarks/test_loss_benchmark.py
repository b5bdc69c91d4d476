"""scripts/benchmarks/linear_loss.py: the fused loss against its products and against all logits."""

import re

import pytest
import torch

from scripts.benchmarks import linear_loss
from scripts.benchmarks.linear_loss import Case, Options, peak

SMALL = ["rounds=1", "tokens=64", "vocabulary=500", "width=16", "device_type=cpu"]


@pytest.mark.slow
def test_time_and_memory_are_printed_with_their_ratios(capsys):
    linear_loss.run(SMALL)
    memory, time = capsys.readouterr().out.splitlines()
    sizes = re.fullmatch(r"peak memory: ([\d,]+) MB, .* ([\d,]+) MB: 1/(\d+)", memory).groups()
    own, full, times = (int(size.replace(",", "")) for size in sizes)
    assert 0 <= own <= full and times >= 1
    assert re.search(r"[\d.]+ x", time)


@pytest.mark.slow
def test_the_memory_of_all_logits_grows_with_the_tokens_as_assumed():
    options, cpu = Options(tokens=96, vocabulary=2000, width=8), torch.device("cpu")
    one, two, three = (peak(Case(options, n, cpu).full_logits, cpu) for n in (32, 64, 96))
    assert three == pytest.approx(2 * two - one, rel=0.01)

"""scripts/benchmarks/train.py: variants of a step, their time and memory against the first's."""

import numpy as np
import pytest

from scripts.benchmarks import train
from scripts.training_step import draw_starts
from utils.core.errors import UserError

TINY = """arch=athena_trm_tiny arch.hidden_size=32 arch.num_heads=2 device_type=cpu seq_len=32
    vocab_size=64 global_batch_size=2 rounds=1""".split()


@pytest.mark.slow
def test_time_and_memory_are_compared_with_the_eager_step(capsys):
    names = ["eager", "unmasked", "checkpointing"]
    train.run([*TINY, "variants=unmasked,checkpointing", "document_tokens=8", "memory=true"])
    *_, head, eager, unmasked, checkpointing = map(str.split, capsys.readouterr().out.splitlines())
    assert head[-2:] == ["MB", "ratio"]
    assert [eager[0], unmasked[0], checkpointing[0]] == names
    assert (eager[1], eager[-1]) == ("1.00", "1.00")
    assert 0 < float(checkpointing[-1]) < 1


def test_an_unknown_variant_is_named():
    with pytest.raises(UserError, match="nothing"):
        train.run([*TINY, "variants=eager,nothing"])


def test_documents_have_the_mean_length_that_was_asked_for():
    starts = draw_starts(4, 4096, 64)
    assert starts.dtype == np.int32 and (np.diff(starts) >= 0).all()
    assert 50 < starts.size / sum(len(np.unique(row)) for row in starts) < 80

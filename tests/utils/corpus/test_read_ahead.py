"""Rows read ahead by threads: the same batches and positions as without, anywhere in a run."""

import json
import threading
import time
from contextlib import ExitStack, closing

import numpy as np
import pytest
from seeds import draw_rng

from sequence_dataset import TrainStream
from tests.stream_tools import (
    assert_same,
    exploration,
    halting,
    random_windows,
    run,
    stream_of,
    write_trm,
    write_windows,
)
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora

SIZE = 16
KINDS = {
    "npy": {},
    "stream": {},
    "npy weighted": {"domain_weights": {"p": 3, "q": 1}},
    "stream weighted": {"domain_weights": {"p": 1, "q": 2}},
    "npy relabel": {},
    "stream relabel": {},
    "trm": {},
}


def _write(folder, kind: str) -> None:
    rng = np.random.default_rng(4)
    if kind == "trm":
        sizes = [[int(n) for n in rng.integers(0, 9, rng.integers(1, 4))] for _ in range(40)]
        write_trm(folder, [[*group, 2] for group in sizes], relabel_ids=(3, 9))
        return
    extra = {"relabel_ids": (2, 30)} if "relabel" in kind else {}
    windows = random_windows(rng, 90)
    write_windows(folder, windows, kind.split()[0], domains=("p", "q"), **extra)


@pytest.mark.parametrize("feed", ["consume", "present"])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_anywhere_on_any_world_with_any_workers(tmp_path, kind, feed):
    _write(tmp_path / "c", kind)
    corpora, flags = Corpora([tmp_path / "c"]), halting(7, SIZE)
    options = {"global_batch_size": SIZE, "seed": 1, "epochs": 2.5, "feed": feed} | KINDS[kind]
    options |= {"row_options": exploration(0.3, 5)}
    whole = TrainStream(corpora, **options)
    expected, states = [], [json.dumps(whole.state_dict())]
    while batches := run([whole], flags, first=len(expected), steps=1):
        expected += batches
        states.append(json.dumps(whole.state_dict()))
    stops = draw_rng()
    for world in (1, 2, 4, 8):
        for workers in (0, 1, 4):
            stop = int(stops.integers(0, len(expected) + 1))
            streams = [
                TrainStream(
                    corpora,
                    rank=r,
                    world_size=world,
                    micro_batches=1 + (workers == 1),
                    num_workers=workers,
                    **options,
                )
                for r in range(world)
            ]
            run(streams, flags, steps=int(stops.integers(0, 9)))  # what is read ahead is dropped
            for stream in streams:
                stream.load_state_dict(json.loads(states[stop]))
            middle = int(stops.integers(0, len(expected) - stop + 1))
            found = run(streams, flags, first=stop, steps=middle)
            for stream in streams:
                assert json.dumps(stream.state_dict()) == states[stop + len(found)]
            found += run(streams, flags, first=stop + len(found))
            assert_same(found, expected[stop:])
            for stream in streams:
                stream.close()


@pytest.fixture
def corpus(tmp_path):
    write_windows(tmp_path / "c", random_windows(np.random.default_rng(2), 400), "stream")
    return Corpora([tmp_path / "c"])


@pytest.fixture
def opened():
    """Open streams that are closed at the end of the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(closing(stream_of(*args, **options)))


def test_held_rows_restart_with_workers_too(corpus, opened):
    flags = halting(3, 8)
    stream, *fresh = (opened(corpus, num_workers=workers) for workers in (2, 0, 2))
    run([stream], flags, steps=6)
    for other in fresh:
        other.load_state_dict(stream.state_dict(), restart_held=True)
    again = [other.next(6, np.ones(8, bool)) for other in fresh]
    assert_same(*again)
    assert_same(*([*run([other], flags, first=7)] for other in fresh))


@pytest.mark.parametrize("feed", ["consume", "present"])
def test_the_next_rows_are_read_before_they_are_asked_for(corpus, monkeypatch, feed):
    read, rows = [], corpus.rows
    monkeypatch.setattr(corpus, "rows", lambda i, *to: read.append(len(i)) or rows(i, *to))
    with_threads = stream_of(corpus, feed=feed, num_workers=2, epochs=20)
    assert not read  # a stream that is only loaded or saved reads nothing
    for step in range(20):
        with_threads.next(step, np.ones(8, bool))
        wait_until(lambda step=step: sum(read) >= 8 * (step + 2))
        time.sleep(0.002)
        assert sum(read) <= 8 * (step + 1) + 3 * 8  # and no more than is bounded
    with_threads.close()


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the rows were not read ahead"
        time.sleep(0.001)


def test_ranks_read_ahead_only_what_is_theirs_where_that_is_known(corpus, monkeypatch):
    read, rows = [], corpus.rows
    monkeypatch.setattr(corpus, "rows", lambda i, *to: read.append(len(i)) or rows(i, *to))
    stream = stream_of(corpus, feed="present", num_workers=1, rank=1, world_size=4)
    stream.next(0, np.ones(8, bool))
    stream.close()
    assert set(read) == {2}


def test_an_error_in_a_thread_is_raised_by_next(corpus, monkeypatch):
    rows = corpus.rows

    def failing(index, *to):
        if 77 in index:
            raise UserError("row 77 is damaged")
        return rows(index, *to)

    monkeypatch.setattr(corpus, "rows", failing)
    stream = stream_of(corpus, num_workers=3, epochs=1)
    with pytest.raises(UserError, match="row 77 is damaged"):
        run([stream], lambda step: np.ones(8, bool))
    stream.close()


@pytest.mark.parametrize("feed", ["consume", "present"])
def test_closing_ends_the_threads_and_forgets_nothing(corpus, feed):
    def own() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name.startswith("read-ahead")}

    before, flags = own(), halting(1, 8)
    expected = run([stream_of(corpus, feed=feed)], flags)
    stream = stream_of(corpus, feed=feed, num_workers=3)
    head = run([stream], flags, steps=5)
    assert own() - before
    stream.close()
    stream.close()
    assert own() == before
    assert "num_workers" not in json.dumps(stream.state_dict())
    assert_same(head + run([stream], flags, first=5), expected)
    stream.close()

"""The stream: nothing lost, nothing twice, the same on any number of ranks, resumable anywhere."""

from collections import Counter

import numpy as np
import pytest

from sequence_dataset import EvalStream
from tests.stream_tools import (
    PAD,
    S,
    assert_same,
    exploration,
    halting,
    ids_of,
    joined,
    real_rows,
    run,
    stream_of,
    write_corpus,
    write_trm,
)
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "c", 97, names=("x", "y"), domains=("p", "q", "r"))
    return Corpora([str(tmp_path / "c")])


@pytest.mark.parametrize("world, micro", [(1, 1), (2, 2), (4, 1), (4, 2)])
def test_epoch_enters_every_example_once(corpus, tmp_path, world, micro):
    inputs = np.load(tmp_path / "c/train/all/inputs.npy")
    streams = [
        stream_of(corpus, epochs=1, rank=rank, world_size=world, micro_batches=micro)
        for rank in range(world)
    ]
    batches = run(streams, halting(1, 8))
    assert ids_of(batches, inputs) == Counter(range(97))
    assert streams[0].examples_entered == streams[0].position == 97
    assert streams[0].progress == 1.0 and streams[0].epoch == 1.0


def test_epochs_follow_without_a_barrier_in_another_order(corpus, tmp_path):
    inputs = np.load(tmp_path / "c/train/all/inputs.npy")
    stream = stream_of(corpus, epochs=2.5)
    batches = run([stream], lambda step: np.ones(8, bool))
    rows = np.concatenate([batch["inputs"][real_rows(batch)] for batch in batches])
    assert len(rows) == round(2.5 * 97)
    assert all(real_rows(batch).all() for batch in batches[:-1])
    epochs = [rows[:97], rows[97:194], rows[194:]]
    for epoch in epochs[:2]:
        assert ids_of([{"inputs": epoch, "labels": epoch}], inputs) == Counter(range(97))
    assert not (epochs[0] == epochs[1]).all()
    assert not (rows[:97] == inputs).all()


def test_same_global_batches_on_any_world(corpus):
    options = {"row_options": exploration(0.5, 6)}
    expected = run([stream_of(corpus, **options)], halting(2, 8))
    for world in (1, 2, 4):
        for micro in (1, 2):
            streams = [
                stream_of(corpus, rank=r, world_size=world, micro_batches=micro, **options)
                for r in range(world)
            ]
            assert_same(run(streams, halting(2, 8)), expected)


def test_row_options_get_the_progress_of_the_run_and_go_to_their_slots(corpus):
    given = []

    def draw(progress, rng, rows):
        given.append(progress)
        return {"depth": rng.integers(1, 9, rows)}

    whole, half = (
        stream_of(corpus, row_options=draw, rank=world - 1, world_size=world) for world in (1, 2)
    )
    for step, limit in ((1, 0.25), (2, 0.0)):
        before = whole.progress
        (all_rows,), (own,) = (s.next(step, np.ones(8, bool), limit) for s in (whole, half))
        assert given[-2:] == [max(before, limit)] * 2
        np.testing.assert_array_equal(own["depth"], all_rows["depth"][4:])


def test_shapes_are_static_and_held_slots_are_ignored(corpus):
    stream = stream_of(corpus, micro_batches=2)
    first = stream.next(0, np.ones(8, bool))
    halted = np.array([0, 1, 0, 0, 1, 0, 0, 1], bool)
    second = stream.next(1, halted)
    assert len(first) == len(second) == 2
    for before, after in zip(first, second, strict=True):
        assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
        assert all(array.dtype == np.int32 for array in after.values())
    batch = joined(second)
    np.testing.assert_array_equal(real_rows(batch), halted)
    held = ~halted
    assert (batch["inputs"][held] == PAD).all() and (batch["labels"][held] == -100).all()
    assert (batch["puzzle_identifiers"][held] == 0).all()
    assert (batch["iteration_targets"][held] == 1).all()
    assert (batch["document_starts"][held] == S).all()


def test_freed_slots_are_filled_in_ascending_order(corpus):
    everything = stream_of(corpus, global_batch_size=11).next(0, np.ones(11, bool))[0]["inputs"]
    stream = stream_of(corpus)
    stream.next(0, np.ones(8, bool))
    batch = stream.next(1, np.array([0, 1, 0, 0, 1, 0, 0, 1], bool))[0]
    np.testing.assert_array_equal(batch["inputs"][[1, 4, 7]], everything[8:])


def test_slots_drain_and_then_the_run_is_over(corpus):
    stream = stream_of(corpus, epochs=11 / 97)
    stream.next(0, np.ones(8, bool))
    assert real_rows(stream.next(1, np.arange(8) < 5)[0]).sum() == 3
    held = stream.state_dict()["held_places"]
    assert [place >= 0 for place in held] == [True] * 3 + [False] * 2 + [True] * 3
    assert not real_rows(stream.next(2, np.arange(8) < 5)[0]).any()  # two of these hold nothing
    assert not real_rows(stream.next(3, np.arange(8) == 7)[0]).any()
    assert stream.next(4, np.arange(8) >= 5) is None
    assert stream.next(5, np.ones(8, bool)) is None
    assert stream.examples_entered == 11


def test_max_draws_ends_the_run_early(corpus):
    batches = run([stream_of(corpus, max_draws=21)], halting(1, 8))
    assert sum(real_rows(batch).sum() for batch in batches) == 21
    assert stream_of(corpus, max_draws=21, feed="present").total_steps == 2


def test_only_own_rows_are_read(corpus, monkeypatch):
    read = []
    rows = corpus.rows
    monkeypatch.setattr(
        corpus, "rows", lambda index, *to: read.append(len(index)) or rows(index, *to)
    )
    stream = stream_of(corpus, rank=1, world_size=4)
    stream.next(0, np.ones(8, bool))
    stream.next(1, np.array([1, 1, 0, 1, 1, 1, 1, 1], bool))
    assert read == [2, 1]


def test_present_runs_trms_number_of_steps_with_full_batches(tmp_path):
    rng = np.random.default_rng(3)
    sizes = [[int(n) for n in rng.integers(1, 5, rng.integers(1, 4))] for _ in range(30)]
    arrays = write_trm(tmp_path / "t", sizes)
    stream = stream_of(Corpora([tmp_path / "t"]), feed="present", epochs=3.7)
    mean = len(arrays["inputs"]) / (len(arrays["puzzle_indices"]) - 1)
    assert stream.total_steps == int(3.7 * 30 * mean / 8)
    batches = run([stream], halting(4, 8))
    assert len(batches) == stream.total_steps and stream.progress == 1.0
    assert all(len(batch["inputs"]) == 8 for batch in batches)
    assert all((batch["puzzle_identifiers"] > 0).all() for batch in batches)
    assert "iteration_targets" not in batches[0] and "domain_ids" not in batches[0]
    assert "document_starts" not in batches[0]


def test_each_visit_of_a_trm_group_gives_one_whole_puzzle(tmp_path):
    sizes = [[3], [1, 4, 2], [2, 0, 5], [1], [6, 6]]
    arrays = write_trm(tmp_path / "t", sizes)
    stream = stream_of(Corpora([tmp_path / "t"]), global_batch_size=4, epochs=40)
    batches = run([stream], lambda step: np.ones(4, bool))
    ids = np.concatenate([b["puzzle_identifiers"][real_rows(b)] for b in batches])
    rows = np.concatenate([b["inputs"][real_rows(b)] for b in batches])
    borders, group_of = arrays["puzzle_indices"], np.repeat(np.arange(5), [1, 3, 3, 1, 2])
    place, visits, seen = 0, Counter(), set()
    while place < len(ids):
        puzzle = int(ids[place]) - 1
        start, end = borders[puzzle], borders[puzzle + 1]
        np.testing.assert_array_equal(
            rows[place : place + end - start], arrays["inputs"][start:end]
        )
        place += int(end - start)
        visits[int(group_of[puzzle])] += 1
        seen.add(puzzle)
    assert seen == {0, 1, 2, 3, 4, 6, 7, 8, 9}  # all but the empty one
    assert all(visits[group] == 40 for group in (0, 1, 3, 4)) and visits[2] < 40


def test_a_run_that_ends_in_puzzles_without_rows_is_complete(tmp_path):
    write_trm(tmp_path / "t", [[1], *[[0]] * 20])
    stream = stream_of(Corpora([tmp_path / "t"]), epochs=3)
    run([stream], lambda step: np.ones(8, bool))
    assert stream.examples_entered == 3 and stream.position == 63 and stream.progress == 1.0


def test_held_rows_can_restart_without_a_saved_carry(corpus, tmp_path):
    inputs = np.load(tmp_path / "c/train/all/inputs.npy")
    flags = halting(3, 8)
    stream = stream_of(corpus, epochs=1)
    head = run([stream], flags, steps=6)
    state = stream.state_dict()
    occupied = np.array(state["held_places"]) >= 0
    fresh = stream_of(corpus, epochs=1)
    fresh.load_state_dict(state, restart_held=True)
    again = fresh.next(6, np.ones(8, bool))[0]
    assert real_rows(again)[occupied].all()
    last = {}
    for batch in head:
        last |= {int(i): batch["inputs"][i] for i in np.flatnonzero(real_rows(batch))}
    for slot in np.flatnonzero(occupied):
        np.testing.assert_array_equal(again["inputs"][slot], last[slot])
    tail = run([fresh], flags, first=7)
    counts = ids_of([*head, again, *tail], inputs)
    assert set(counts) == set(range(97)) and counts.total() == 97 + occupied.sum()


@pytest.mark.parametrize(
    "change",
    [{"seed": 6}, {"feed": "present"}, {"domain_weights": "other"}],
)
def test_resuming_something_else_is_refused_with_both_values(corpus, change):
    weights = {"p": 1, "q": 1, "r": 2}
    state = stream_of(corpus, domain_weights=weights).state_dict()
    if "domain_weights" in change:
        change = {"domain_weights": {"p": 1, "q": 1, "r": 1}}
    other = stream_of(corpus, **({"domain_weights": weights} | change))
    (name,) = change
    with pytest.raises(UserError, match=name) as error:
        other.load_state_dict(state)
    assert str(state[name]) in str(error.value)
    assert str(other.state_dict()[name]) in str(error.value)


def test_resuming_on_changed_arrays_is_refused(corpus, tmp_path):
    state = stream_of(corpus).state_dict()
    inputs = np.load(tmp_path / "c/train/all/inputs.npy")
    inputs[50, 3] ^= 1
    np.save(tmp_path / "c/train/all/inputs.npy", inputs)
    with pytest.raises(UserError, match="not the corpora"):
        stream_of(Corpora([tmp_path / "c"])).load_state_dict(state)


def test_weighted_domains_cycle_through_their_own_rows(tmp_path):
    domain_ids = np.array([0] * 50 + [1] * 10 + [2] * 40, np.uint8)
    inputs = write_corpus(
        tmp_path / "c", 100, domains=("p", "q", "r"), arrays={"domain_ids": domain_ids}
    )
    stream = stream_of(
        Corpora([tmp_path / "c"]), epochs=1, domain_weights={"p": 0.5, "q": 0.5, "r": 0}
    )
    batches = run([stream], halting(1, 8))
    counts = ids_of(batches, inputs)
    assert counts.total() == 100
    assert [counts[row] for row in range(100)] == [1] * 50 + [5] * 10 + [0] * 40


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"p": 1, "q": 1}, "missing 'r'"),
        ({"p": 1, "q": 1, "r": 1, "rr": 1}, "'rr'.*did you mean 'r'"),
        ({"p": 1, "q": -1, "r": 1}, "-1"),
        ({"p": 0, "q": 0, "r": 0}, "all 0"),
    ],
)
def test_wrong_domain_weights_are_named(corpus, weights, message):
    with pytest.raises(UserError, match=message):
        stream_of(corpus, domain_weights=weights)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_visits_every_row_once_in_order(tmp_path, world):
    inputs = write_corpus(tmp_path / "c", 21, split="test")
    corpora = Corpora([tmp_path / "c"], "test")
    streams = [
        EvalStream(corpora, global_batch_size=8, rank=r, world_size=world) for r in range(world)
    ]
    seen = []
    for parts in zip(*streams, strict=True):
        assert {name for name, _, _ in parts} == {"all"}
        assert all(batch["inputs"].shape == (8 // world, S) for _, batch, _ in parts)
        batch = joined([batch for _, batch, _ in parts])
        assert {count for _, _, count in parts} == {real_rows(batch).sum()}
        seen.append(batch["inputs"][real_rows(batch)])
        assert (batch["document_starts"][~real_rows(batch)] == S).all()
    assert len(seen) == len(streams[0]) == 3
    np.testing.assert_array_equal(np.concatenate(seen), inputs)
    assert len(list(EvalStream(corpora, global_batch_size=8, max_batches=2))) == 2


def test_empty_test_split_gives_no_batches(tmp_path):
    write_corpus(tmp_path / "c", 0, split="test")
    stream = EvalStream(Corpora([tmp_path / "c"], "test"), global_batch_size=8)
    assert len(stream) == 0 and list(stream) == []


def test_impossible_requests_name_the_values(corpus):
    with pytest.raises(UserError, match=r"global_batch_size 8 .* 3 ranks.* multiple of 3"):
        stream_of(corpus, world_size=3)
    with pytest.raises(UserError, match="multiple of 16"):
        stream_of(corpus, world_size=4, micro_batches=4)
    with pytest.raises(UserError, match="feed is 'eat'"):
        stream_of(corpus, feed="eat")
    with pytest.raises(UserError, match="epochs"):
        stream_of(corpus, epochs=0.001)
    with pytest.raises(UserError, match="one batch of 128"):
        stream_of(corpus, epochs=1, feed="present", global_batch_size=128)

"""Domain weights without a list of all rows: the order is that of a list, and every share exact."""

import numpy as np
import pytest
from seeds import draw_rng

from tests.stream_tools import (
    random_windows,
    write_corpus,
    write_trm,
    write_windows,
)
from utils.corpus.corpora import Corpora
from utils.corpus.domain_index import DomainIndex
from utils.corpus.order import ORDER, ExampleOrder, Position
from utils.corpus.permutation import QuotaSchedule, hash64, permute


@pytest.mark.parametrize("groups, domains", [(1, 1), (511, 2), (512, 3), (513, 3), (9000, 5)])
def test_select_equals_a_listing(groups, domains, monkeypatch):
    monkeypatch.setattr("utils.corpus.domain_index._BLOCKS_AT_ONCE", 3)
    rng = draw_rng()
    of_group = rng.integers(0, domains, groups)
    of_group[of_group == 1] = 0  # one that no group has
    if groups > 4000:
        of_group[1000:3000] = 3  # blocks without the others
    index = DomainIndex(lambda wanted: of_group[wanted], groups, domains)
    np.testing.assert_array_equal(index.sizes, np.bincount(of_group, minlength=domains))
    for domain in range(domains):
        members = np.flatnonzero(of_group == domain)
        order = rng.permutation(members.size)
        np.testing.assert_array_equal(index.select(domain, order), members[order])


def listed_visits(of_group: np.ndarray, seed: int, weights: list[float], places: np.ndarray):
    """The order of a run with weights, from a list of each domain's groups."""
    domain, count = QuotaSchedule(weights).draws(places)
    groups, cycles = [], []
    for number, earlier in zip(domain.tolist(), count.tolist(), strict=True):
        members = np.flatnonzero(of_group == number)
        cycle, index = divmod(earlier, members.size)
        key = hash64(seed, ORDER, np.array([cycle]), number)
        groups.append(int(members[permute(np.array([index]), members.size, key)[0]]))
        cycles.append(cycle)
    return groups, cycles


@pytest.mark.parametrize("kind", ["npy", "stream", "joined", "trm"])
def test_weighted_order_is_that_of_a_listing(tmp_path, kind):
    rng, rows = draw_rng(), 1500
    if kind == "trm":
        sizes = [[int(n) for n in rng.integers(1, 3, rng.integers(1, 3))] for _ in range(rows)]
        arrays = write_trm(tmp_path / "c", sizes, domains=["p", "q"])
        own = rng.integers(0, 2, len(arrays["inputs"])).astype(np.uint8)
        np.save(tmp_path / "c/train/all__domain_ids.npy", own)
        first = arrays["puzzle_indices"][arrays["group_indices"][:-1]]
        paths, of_group, names = ["c"], own[first], ["p", "q"]
    else:
        paths, stored = ["c", "d"] if kind == "joined" else ["c"], []
        for path, domains in zip(paths, (("p", "q"), ("r", "q")), strict=False):
            if kind == "npy":
                write_corpus(tmp_path / path, rows, domains=domains)
            else:
                windows = random_windows(rng, rows)
                write_windows(tmp_path / path, windows, "stream", domains=domains)
            own = np.load(tmp_path / path / "train/all/domain_ids.npy")
            stored.append(np.array(["pqr".index(name) for name in domains])[own])
        of_group, names = np.concatenate(stored), ["p", "q", "r"][: len(paths) + 1]
    corpora = Corpora([tmp_path / path for path in paths])
    assert corpora.domains == names
    weights = dict(zip(names, (0.7, 0.2, 0.1), strict=False))
    order = ExampleOrder(corpora, 11, weights, None)
    places = rng.integers(0, 20 * rows, 300)
    groups, cycles = listed_visits(of_group, 11, list(weights.values()), places)
    found = order.find_groups(places)
    np.testing.assert_array_equal(found[0], groups)
    np.testing.assert_array_equal(found[1], cycles)


@pytest.mark.parametrize("layout", ["npy", "stream"])
def test_shares_are_exact_and_no_cycle_repeats_an_order(tmp_path, layout):
    windows = random_windows(draw_rng(), 700)
    domain_ids = np.repeat([0, 1, 2], [600, 70, 30]).astype(np.uint8)
    write_windows(
        tmp_path / "c", windows, layout, domains=("p", "q", "r"), arrays={"domain_ids": domain_ids}
    )
    corpora, weights = Corpora([tmp_path / "c"]), {"p": 0.5, "q": 0.333, "r": 0.167}
    order = ExampleOrder(corpora, 3, weights, None)
    for first in (0, 10_000):
        groups = order.list_from(Position(first), 10_000).row[:10_000]
        for number, share in enumerate(weights.values()):
            drawn = groups[domain_ids[groups] == number]
            assert abs(drawn.size / 10_000 - share) <= 0.001
    drawn = groups[domain_ids[groups] == 2]
    begin = -(10_000 * 0.167) % 30  # to the next whole cycle of the 30 rows
    cycles = [tuple(drawn[i : i + 30]) for i in range(round(begin), drawn.size - 30, 30)]
    assert all(sorted(cycle) == list(range(670, 700)) for cycle in cycles)
    assert len(set(cycles)) == len(cycles) > 40


def test_recorded_weights_count_groups_by_domain(tmp_path):
    recorded = {"domain_weights": {"p": 3.0, "q": 2.0}, "domains": ("p", "q", "r", "s")}
    domain_ids = np.repeat([0, 2, 3], [900, 50, 50]).astype(np.uint8)
    write_corpus(tmp_path / "c", 1000, arrays={"domain_ids": domain_ids}, **recorded)
    weights = Corpora([tmp_path / "c"]).recorded_weights()
    assert weights == {"p": 3.0, "q": 0.0, "r": 1.0, "s": 1.0}

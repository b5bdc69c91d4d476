"""Keyed permutations and quotas."""

import numpy as np
import pytest
from seeds import draw_rng

from utils.corpus.permutation import QuotaSchedule, hash64, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(size):
    orders = [permute(np.arange(size), size, hash64(seed)) for seed in range(8)]
    for order in orders:
        assert sorted(order) == list(range(size))
    if size > 8:
        assert len({order.tobytes() for order in orders}) == 8


def test_permutations_are_even_over_keys():
    size, trials = 7, 21_000
    keys = hash64(11, np.arange(trials))
    images = [permute(np.full(trials, i), size, keys) for i in range(2)]
    for values, cells in ((images[0], size), ((images[1] - images[0]) % size - 1, size - 1)):
        counts = np.bincount(values, minlength=cells)
        assert np.abs(counts - trials / cells).max() < 5 * np.sqrt(trials / cells)


def test_position_reaches_any_place_without_history():
    size = 10**12 + 39
    far = permute(np.array([10**12, 3]), size, hash64(0))
    assert (far >= 0).all() and (far < size).all()
    assert far[1] == permute(np.array([3]), size, hash64(0))[0]


def test_domain_quotas_are_exact_and_counted_without_history():
    weights = draw_rng().random(6) + 0.01
    schedule = QuotaSchedule(weights)
    source, count = schedule.draws(np.arange(25_000))
    for start in (0, 1, 7_777, 15_000):
        share = np.bincount(source[start : start + 10_000], minlength=6) / 10_000
        assert np.abs(share - weights / weights.sum()).max() < 1e-3
    for number in range(6):
        np.testing.assert_array_equal(count[source == number], np.arange((source == number).sum()))
    # Spread evenly: a short run is close to its quota too.
    share = np.bincount(source[:200], minlength=6) / 200
    assert np.abs(share - weights / weights.sum()).max() < 0.02


def test_a_tiny_weight_is_not_lost():
    assert QuotaSchedule([1e-9, 1, 0]).counts.tolist() == [1, 9_999, 0]

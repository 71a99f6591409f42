"""Windows are shuffled by a permutation that no table holds."""

import tracemalloc

import numpy as np
import pytest

from smollm.data.order import MOST, shuffled
from smollm.data.shards import TokenWindows


def permutation(count, seed=0, epoch=0):
    return shuffled(range(epoch * count, (epoch + 1) * count), count, (seed,)).astype(np.int64)


@pytest.mark.parametrize("count", [*range(1, 71), 255, 256, 257, 1000, 4095, 65_537, 100_003])
def test_every_place_is_taken_once(count):
    for seed, epoch in ((0, 0), (8, 3)):
        assert np.array_equal(np.sort(permutation(count, seed, epoch)), np.arange(count))


def test_all_orders_of_a_few_places_come_about():
    orders = {tuple(permutation(4, seed)) for seed in range(400)}
    assert len(orders) == 24
    first = np.array([permutation(5, seed)[0] for seed in range(2000)])
    assert np.abs(np.bincount(first) - 400).max() < 100  # 5.6 standard deviations


def test_seeds_and_epochs_have_orders_of_their_own():
    count = 10_000
    orders = [permutation(count, *which) for which in ((0, 0), (0, 1), (1, 0), (1, 1), (2**63, 0))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.sum(one == other) < 12  # 1 on average
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


@pytest.mark.parametrize("count", [99_856, 100_000, 131_073])
def test_an_order_is_that_of_a_good_shuffle(count):
    order = permutation(count, seed=3)
    places = np.arange(count)
    sigma = 1 / np.sqrt(count)
    assert abs(np.corrcoef(places, order)[0, 1]) < 5 * sigma
    for lag in (1, 2, 316, 317, 1000):  # 316 is about the side of the network's rectangle
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 * sigma
        steps = np.diff(order[::lag]) % count
        assert np.unique(steps, return_counts=True)[1].max() < 12  # as dice fall; a stride repeats
    assert np.sum(order == places) < 9  # 1 on average
    cells = np.histogram2d(places, order, bins=20)[0]
    expected = count / 400
    assert ((cells - expected) ** 2 / expected).sum() < 361 + 5 * np.sqrt(2 * 361)
    for bit in range(10):
        assert abs(np.corrcoef(places >> bit & 1, order >> bit & 1)[0, 1]) < 5 * sigma


def test_an_order_of_any_length_takes_no_memory():
    examples = range(10**15 + 7, 10**15 + 7 + 4096)
    tracemalloc.start()
    found = {count: shuffled(examples, count, (1,)) for count in (10**12, MOST)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    for count, places in found.items():
        assert len(np.unique(places)) == 4096 and places.max() < count
        assert abs(places.mean() / count - 0.5) < 0.025
        again = shuffled(examples[100:200], count, (1,))
        assert np.array_equal(again, places[100:200])


@pytest.mark.parametrize("count", [0, -1, MOST + 1])
def test_a_count_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match=f"count: expected 1 to {MOST}, got {count}"):
        shuffled([0], count, (0,))


def test_a_batch_may_span_many_epochs():
    reader = TokenWindows([np.arange(6, dtype=np.uint16)])
    starts = reader.batch(5, 8, 2, seed=0)[:, 0].tolist()
    one_by_one = [int(reader.batch(i, 1, 2, seed=0)[0, 0]) for i in range(40, 48)]
    assert starts == one_by_one
    assert sorted(one_by_one[2:5]) == [0, 2, 4]

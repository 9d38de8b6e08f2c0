"""The order of samples: a permutation per epoch, the same for any number of ranks, from any step on."""

import time

import numpy as np
import pytest

from loaders.errors import DataError
from loaders.order import Order, shard


def epoch_of(order, epoch):
    first = epoch * order.steps_per_epoch
    return np.concatenate([order.ids(first + s) for s in range(order.steps_per_epoch)])


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 16, 17, 255, 257, 1000, 4097])
def test_an_epoch_is_a_permutation(num_samples):
    order = Order(num_samples, 1, seed=3)
    for epoch in (0, 1, 5):
        assert sorted(epoch_of(order, epoch)) == list(range(num_samples))


def test_epochs_and_seeds_differ():
    epochs = [epoch_of(Order(100, 10, seed), e) for seed in (0, 1, 2**40) for e in range(3)]
    for i, a in enumerate(epochs):
        for b in epochs[:i]:
            assert (a == b).mean() < 0.2


def test_incomplete_batches_are_dropped_and_differ_by_epoch():
    order = Order(103, 10)
    assert order.steps_per_epoch == 10
    left_out = [frozenset(range(103)) - set(epoch_of(order, e).tolist()) for e in range(5)]
    assert all(len(missing) == 3 for missing in left_out) and len(set(left_out)) > 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_order_does_not_depend_on_the_ranks(world):
    one, many = Order(1003, 32, seed=5), Order(1003, 32, seed=5)
    for step in (0, 30, 31, 100):
        ranks = [many.ids(step, rank, world) for rank in range(world)]
        assert all(len(r) == 32 // world for r in ranks)
        np.testing.assert_array_equal(np.concatenate(ranks), one.ids(step))


def test_any_step_can_be_asked_for_at_once():
    order = Order(1_281_167, 1024, seed=9)
    straight = [order.ids(s) for s in range(1240, 1260)]  # across the end of epoch 0
    resumed = Order(1_281_167, 1024, seed=9)
    np.testing.assert_array_equal(resumed.ids(1255), straight[15])
    start = time.perf_counter()
    resumed.ids(10**9)
    assert time.perf_counter() - start < 1
    assert [order.epoch(s) for s in (0, 1250, 1251, 2502)] == [0, 0, 1, 2]


def test_every_sample_visits_every_position():
    n, epochs = 7, 3000
    order, seen = Order(n, n, seed=1), np.zeros((n, n))
    for e in range(epochs):
        seen[np.arange(n), order.ids(e)] += 1
    expected, freedom = epochs / n, (n - 1) ** 2
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_are_unrelated():
    ids = Order(5000, 5000).ids(0)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(ids, np.arange(5000))[0, 1]) < 0.06


def test_without_shuffling_it_is_the_files_order():
    order = Order(25, 10, shuffle=False)
    assert [order.ids(s).tolist() for s in (0, 1, 2)] == [list(range(10)), list(range(10, 20)), list(range(10))]
    assert order.ids(1, rank=1, world=2).tolist() == list(range(15, 20))


@pytest.mark.parametrize(
    ("num_samples", "batch", "world", "words"), [(9, 10, 1, "at most 9"), (9, 0, 1, "at least 1"), (9, 9, 2, "multiple of 2")]
)
def test_impossible_batches_are_refused(num_samples, batch, world, words):
    with pytest.raises(DataError, match=words):
        Order(num_samples, batch).ids(0, 0, world)


@pytest.mark.parametrize(("num_samples", "world"), [(0, 1), (1, 4), (10, 3), (50_000, 8)])
def test_a_pass_has_every_sample_on_exactly_one_rank(num_samples, world):
    shards = [shard(num_samples, rank, world) for rank in range(world)]
    assert [i for s in shards for i in s] == list(range(num_samples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1

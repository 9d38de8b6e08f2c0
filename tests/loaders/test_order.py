"""The order of samples: a pure function of the step, the same for any number of ranks, from any step on."""

import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from loaders.errors import DataError
from loaders.order import CHUNK, WINDOW, Order, draw, shard

LABELS = np.repeat(np.arange(7), (3, 40, 11, 25, 100, 60, 19))[np.random.default_rng(0).permutation(258)].astype(np.int64)
"""258 samples of 7 classes of very different size."""


def epoch_of(order, epoch):
    first = epoch * order.steps_per_epoch
    return np.concatenate([order.ids(first + s) for s in range(order.steps_per_epoch)])


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 16, 17, 255, 257, 1000, 4097])
def test_an_epoch_is_a_permutation(num_samples):
    order = Order(num_samples, 1, seed=3)
    for epoch in (0, 1, 5):
        assert sorted(epoch_of(order, epoch)) == list(range(num_samples))


@pytest.mark.parametrize("sampling", ["shuffle", "chunks", "balanced"])
def test_epochs_and_seeds_differ(sampling):
    labels = np.arange(200) % 5
    epochs = [epoch_of(Order(200, 10, seed, sampling=sampling, labels=labels), e) for seed in (0, 1, 2**40) for e in range(3)]
    for i, a in enumerate(epochs):
        for b in epochs[:i]:
            assert (a == b).mean() < 0.2


def test_incomplete_batches_are_dropped_and_differ_by_epoch():
    order = Order(103, 10)
    assert order.steps_per_epoch == 10
    left_out = [frozenset(range(103)) - set(epoch_of(order, e).tolist()) for e in range(5)]
    assert all(len(missing) == 3 for missing in left_out) and len(set(left_out)) > 1


ORDERS = {
    "shuffle": {"sampling": "shuffle"},
    "chunks": {"sampling": "chunks"},
    "balanced": {"sampling": "balanced", "labels": LABELS},
    "sequential": {"sampling": "sequential"},
    "subset": {"sampling": "chunks", "ids": np.arange(1, 258, 2)},
    "balanced subset": {"sampling": "balanced", "labels": LABELS, "ids": np.flatnonzero(LABELS != 4)},
    "kept": {"sampling": "shuffle", "last_batch": "keep", "multiple_of": 24},
    "balanced kept": {"sampling": "balanced", "labels": LABELS, "last_batch": "keep", "multiple_of": 24},
}


@pytest.mark.parametrize("options", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_global_order_does_not_depend_on_the_ranks(options, world):
    one, many = Order(258, 48, seed=5, **options), Order(258, 48, seed=5, **options)
    for step in (0, 1, one.steps_per_epoch - 1, one.steps_per_epoch, 7 * one.steps_per_epoch - 1, 100):
        ranks = [many.ids(step, rank, world) for rank in range(world)]
        assert all(len(r) == one.batch_size(step) // world for r in ranks)
        np.testing.assert_array_equal(np.concatenate(ranks), one.ids(step))


@pytest.mark.parametrize("options", ORDERS.values(), ids=ORDERS)
def test_every_step_can_be_resumed(options):
    straight = [Order(258, 24, seed=9, **options).ids(s) for s in range(30)]
    order = Order(258, 24, seed=9, **options)
    for step in reversed(range(30)):
        np.testing.assert_array_equal(order.ids(step), straight[step])


def test_any_step_can_be_asked_for_at_once():
    labels = np.arange(1_281_167) % 1000
    for sampling in ("shuffle", "chunks", "balanced"):
        order = Order(1_281_167, 1024, seed=9, sampling=sampling, labels=labels)
        order.ids(1249)
        start = time.perf_counter()
        order.ids(10**9)
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


def test_the_shuffled_order_stays_what_it_was():
    """Runs that were started before can be resumed."""
    assert Order(1000, 8, seed=5).ids(130).tolist() == [408, 506, 668, 854, 189, 131, 467, 414]


def test_sequential_is_the_stored_order():
    order = Order(25, 10, sampling="sequential")
    assert [order.ids(s).tolist() for s in (0, 1, 2)] == [list(range(10)), list(range(10, 20)), list(range(10))]
    assert order.ids(1, rank=1, world=2).tolist() == list(range(15, 20))


@pytest.mark.parametrize(
    ("num_samples", "batch", "world", "words"), [(9, 10, 1, "at most 9"), (9, 0, 1, "at least 1"), (9, 9, 2, "multiple of 2")]
)
def test_impossible_batches_are_refused(num_samples, batch, world, words):
    with pytest.raises(DataError, match=words):
        Order(num_samples, batch).ids(0, 0, world)


def test_unknown_orders_are_refused():
    with pytest.raises(DataError, match="shuffle, chunks, balanced, sequential"):
        Order(9, 3, sampling="random")


@pytest.mark.parametrize(("num_samples", "world"), [(0, 1), (1, 4), (10, 3), (50_000, 8)])
def test_a_pass_has_every_sample_on_exactly_one_rank(num_samples, world):
    shards = [shard(num_samples, rank, world) for rank in range(world)]
    assert [i for s in shards for i in s] == list(range(num_samples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_draws_are_different_numbers():
    drawn = [draw(10, 13, seed, number) for seed in (0, 1) for number in range(20)]
    assert all(len(set(d)) == 10 and 0 <= d.min() and d.max() < 13 for d in drawn)
    assert len({tuple(d) for d in drawn}) == 40
    assert set(draw(13, 13, 0, 0)) == set(range(13))


# ------------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize(
    "num_samples", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK + 100, WINDOW - 1, WINDOW, WINDOW + 3, 2 * WINDOW + 5 * CHUNK + 7]
)
def test_chunks_have_every_sample_once(num_samples):
    order = Order(num_samples, 1 if num_samples < 10 else num_samples // 5, sampling="chunks", last_batch="keep", seed=2)
    for epoch in (0, 1, 4):
        ids = epoch_of(order, epoch)[:num_samples]
        np.testing.assert_array_equal(np.sort(ids), np.arange(num_samples))


@pytest.mark.parametrize("subset", [None, np.sort(np.random.default_rng(1).choice(90_000, 40_000, replace=False))])
def test_a_window_reads_few_pieces_of_the_file(subset):
    """Positions of one window come from at most 64 runs of 256 neighbours (one more where counting passes the file's end)."""
    n, batch = 40_000, 1000
    order = Order(n if subset is None else 90_000, batch, sampling="chunks", last_batch="keep", ids=subset, seed=4)
    stored = np.arange(n) if subset is None else subset
    for epoch in (0, 3):
        ids = epoch_of(order, epoch)
        for w, first in enumerate(range(0, n, WINDOW)):
            window = ids[first : first + WINDOW]
            places = np.sort(np.searchsorted(stored, window))
            assert 1 + (np.diff(places) > 1).sum() <= WINDOW // CHUNK + 1
            assert abs(np.corrcoef(window[:-1], window[1:])[0, 1]) < 0.06  # mixed within
            np.testing.assert_array_equal(order.window_ids(epoch * 3 + w), np.sort(window))


def test_windows_are_counted_over_epochs():
    order = Order(40_000, 1000, sampling="chunks")
    assert [order.window(s) for s in (0, 15, 16, 32, 39, 40, 56)] == [0, 0, 1, 2, 2, 3, 4]


def test_chunks_differ_by_epoch():
    """Neither the borders of the chunks nor the short one, which comes last, are those of the epoch before."""
    order = Order(WINDOW + 100, WINDOW + 100, sampling="chunks")
    last = [frozenset(order.window_ids(2 * e + 1).tolist()) for e in range(6)]
    assert len(set(last)) == 6


# ------------------------------------------------------------------------------------------------ balanced


@pytest.mark.parametrize("ids", [None, np.flatnonzero(LABELS % 2 == 0)])
def test_classes_take_turns(ids):
    order = Order(len(LABELS), 10, sampling="balanced", labels=LABELS, ids=ids, seed=3)
    kept = np.arange(len(LABELS)) if ids is None else ids
    assert order.steps_per_epoch == len(kept) // 10
    visits = np.concatenate([epoch_of(order, e) for e in range(20)])
    classes = len(np.unique(LABELS[kept]))
    turns = LABELS[visits[: len(visits) // classes * classes]].reshape(-1, classes)
    assert (np.sort(turns, 1) == np.unique(LABELS[kept])).all()
    assert len({tuple(t) for t in turns.tolist()}) > 15  # in a random order
    for c in np.unique(LABELS[kept]):
        members = np.flatnonzero(LABELS[kept] == c)
        mine = visits[LABELS[visits] == c]
        cycles = [mine[i : i + len(members)] for i in range(0, len(mine), len(members))]
        assert all(len(set(cycle)) == len(cycle) for cycle in cycles)
        assert set(cycles[0]) == set(kept[members]) or len(cycles) == 1
        whole = [tuple(cycle) for cycle in cycles if len(cycle) == len(members)]
        assert len(members) < 10 or len(set(whole)) == len(whole)  # a new permutation each time


def test_repeated_images_are_cut_anew():
    """In a balanced order an image of a small class comes several times an epoch, and in a large batch several times a step; it
    must not look the same each time."""
    balanced = Order(len(LABELS), 50, sampling="balanced", labels=LABELS, last_batch="keep", multiple_of=10)
    steps = [balanced.ids(s) for s in range(balanced.steps_per_epoch)]
    assert Counter(steps[0].tolist()).most_common(1)[0][1] > 1
    keys = [balanced.keys(s, ids) for s, ids in enumerate(steps)]
    assert np.unique(np.concatenate(keys)).size == sum(map(len, steps)) == 260  # the last two fill up
    for s, ids in enumerate(steps):
        np.testing.assert_array_equal(np.concatenate([balanced.keys(s, part, r) for r, part in enumerate(np.split(ids, 5))]), keys[s])
        np.testing.assert_array_equal(balanced.keys(s + 3 * balanced.steps_per_epoch, ids), keys[s])


@pytest.mark.parametrize("sampling", ["shuffle", "chunks", "sequential"])
def test_images_that_come_once_have_their_ids_as_keys(sampling):
    order = Order(len(LABELS), 50, sampling=sampling)
    for step in (0, 3, 7):
        for rank in range(2):
            ids = order.ids(step, rank, 2)
            np.testing.assert_array_equal(order.keys(step, ids, rank), ids)


def test_balance_needs_labels():
    with pytest.raises(DataError, match="needs labels"):
        Order(100, 10, sampling="balanced")


# ------------------------------------------------------------------------------------------------ the last batch


@pytest.mark.parametrize(
    ("num_samples", "batch", "world", "steps", "last"),
    [(1_281_167, 2048, 8, 626, 146), (260_000, 2048, 4, 127, 488), (100_000, 2048, 1, 49, 1696)],
)
def test_kept_batches_are_those_of_sfrik(num_samples, batch, world, steps, last):
    """methods/sfrik.md, 6: ImageNet on 8 ranks, IN20% on 4, STL10 on 1."""
    order = Order(num_samples, batch, last_batch="keep", multiple_of=world)
    assert order.steps_per_epoch == steps
    assert [len(order.ids(s, 0, world)) for s in (steps - 2, steps - 1, steps)] == [batch // world, last, batch // world]


@pytest.mark.parametrize("sampling", ["shuffle", "chunks", "sequential", "balanced"])
@pytest.mark.parametrize(("num_samples", "batch", "world"), [(103, 24, 8), (103, 24, 3), (96, 24, 8), (5, 24, 8), (3, 24, 8), (97, 48, 4)])
def test_a_kept_batch_is_filled_up_as_distributed_sampler_does(sampling, num_samples, batch, world):
    labels = np.arange(num_samples) % 3
    order = Order(num_samples, batch, sampling=sampling, labels=labels, last_batch="keep", multiple_of=world)
    sampler = [list(DistributedSampler(range(num_samples), world, rank, shuffle=False)) for rank in range(world)]
    per_rank = batch // world
    assert order.steps_per_epoch == math.ceil(len(sampler[0]) / per_rank)
    for epoch in (0, 2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        for s in steps:
            ours = [len(order.ids(s, r, world)) for r in range(world)]
            assert ours == [len(x[(s - steps[0]) * per_rank :][:per_rank]) for x in sampler]
        positions = epoch_of(order, epoch)
        added = positions[num_samples:]
        np.testing.assert_array_equal(added, np.resize(positions[:num_samples], len(added)))
        if sampling != "balanced":
            assert sorted(positions[:num_samples]) == list(range(num_samples))


def test_a_kept_batch_divides_into_micro_batches():
    order = Order(103, 48, last_batch="keep", multiple_of=2 * 3)
    assert [order.batch_size(s) for s in range(3)] == [48, 48, 12]
    assert torch.tensor(order.ids(2, 1, 2)).reshape(3, -1).shape == (3, 2)

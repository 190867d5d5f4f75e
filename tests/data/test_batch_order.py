"""The order of batches: every sample exactly once per epoch, the same on every run, processes in step."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.order import BucketSamples, batches_per_epoch, plan_epoch


def make_buckets(counts, batch_sizes):
    """Buckets of datasets in turn, sample ids counted through."""
    buckets, first = [], 0
    for index, count in enumerate(counts):
        dataset = index % len(batch_sizes)
        samples = tuple(range(first, first + count))
        buckets.append(BucketSamples(dataset, (64 + 16 * index, 64), batch_sizes[dataset], samples))
        first += count
    return buckets


def plan(buckets, rank=0, world=1, epoch=1, seed=5, shuffle=True):
    return plan_epoch(buckets, epoch=epoch, seed=seed, rank=rank, world_size=world, shuffle=shuffle)


counts = st.lists(st.integers(1, 17), min_size=1, max_size=6)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(counts, sizes, st.integers(1, 5), st.integers(0, 3))
def test_every_sample_counts_exactly_once_over_all_processes(numbers, batch_sizes, world, epoch):
    buckets = make_buckets(numbers, batch_sizes)
    plans = [plan(buckets, rank, world, epoch) for rank in range(world)]
    assert {len(part) for part in plans} == {
        batches_per_epoch([(len(entry.samples), entry.batch_size) for entry in buckets], world)
    }
    seen = Counter(sample for part in plans for batch in part if not batch.padding for sample in batch.samples)
    assert seen == dict.fromkeys(range(sum(numbers)), 1)
    for together in zip(*plans):
        real = sum(len(batch.samples) for batch in together if not batch.padding)
        assert {batch.group_size for batch in together} == {real}
        for batch in together:
            entry = next(entry for entry in buckets if (entry.dataset, entry.bucket) == (batch.dataset, batch.bucket))
            assert set(batch.samples) <= set(entry.samples) and 0 < len(batch.samples) <= entry.batch_size
    assert sum(batch.padding for part in plans for batch in part) < world


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 4))
def test_processes_together_train_what_one_trains_with_larger_batches(groups, batch_size, world):
    numbers = [number * batch_size * world for number in groups]
    alone = plan(make_buckets(numbers, [batch_size * world]))
    parts = [plan(make_buckets(numbers, [batch_size]), rank, world) for rank in range(world)]
    assert [batch.samples for batch in alone] == [sum((p.samples for p in together), ()) for together in zip(*parts)]
    assert [batch.group_size for batch in alone] == [together[0].group_size for together in zip(*parts)]


def test_epochs_and_seeds_differ_and_repeat():
    buckets = make_buckets([20, 13], [2])
    orders = {(epoch, seed): plan(buckets, epoch=epoch, seed=seed) for epoch in (1, 2) for seed in (1, 2)}
    assert len({tuple(batch.samples for batch in order) for order in orders.values()}) == 4
    assert all(plan(buckets, epoch=epoch, seed=seed) == order for (epoch, seed), order in orders.items())


def test_another_dataset_does_not_disturb_the_order_within_a_bucket():
    alone = plan(make_buckets([12], [3]))
    beside = plan(make_buckets([12, 9], [3]))
    assert {batch.samples for batch in alone} <= {batch.samples for batch in beside}


def test_validation_keeps_the_given_order():
    buckets = make_buckets([5, 3], [2])
    assert [batch.samples for batch in plan(buckets, shuffle=False)] == [(0, 1), (2, 3), (4,), (5, 6), (7,)]


@pytest.mark.parametrize(("world", "expected"), [(1, 6), (2, 3), (3, 2), (4, 2), (7, 1)])
def test_number_of_batches_without_building(world, expected):
    assert batches_per_epoch([(5, 2), (3, 2), (1, 4)], world) == expected

"""The order of an epoch: which samples make which batch on which process.

A function of the dataset, the seed and the epoch alone, so it is the same on every process and after a resume. Samples
of a bucket are shuffled and cut into slices of the batch size; ``world_size`` consecutive slices of a bucket make one
global batch, one slice for each process. So N processes with batch size B train, step by step, what one process with
batch size N*B trains, as far as the buckets divide evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from library.randomness import python_random

Size = tuple[int, int]


@dataclass(frozen=True)
class BucketSamples:
    """The samples of one bucket of one dataset."""

    dataset: int
    bucket: Size
    batch_size: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class BatchPlan:
    """One batch of one process."""

    dataset: int
    """Index of the dataset in its group."""
    bucket: Size
    """(width, height) in pixels."""
    samples: tuple[int, ...]
    """Sample ids: one for each (image, repeat) of the group."""
    group_size: int
    """Real samples in the global batch, over all processes."""
    padding: bool = False
    """This batch repeats another process's samples and must count nothing."""


def plan_epoch(
    buckets: Sequence[BucketSamples], *, epoch: int, seed: int, rank: int, world_size: int, shuffle: bool = True
) -> list[BatchPlan]:
    """The batches of process ``rank`` in ``epoch``, in order; every process has the same number of them."""
    groups = global_batches(buckets, epoch=epoch, seed=seed, world_size=world_size, shuffle=shuffle)
    return [_member(group, rank) for group in groups]


def global_batches(
    buckets: Sequence[BucketSamples], *, epoch: int, seed: int, world_size: int, shuffle: bool = True
) -> list[list[BatchPlan]]:
    """The batches of an epoch, in order: of each, the slices that go to the processes (at most ``world_size``)."""
    whole: list[list[BatchPlan]] = []
    leftover: list[BatchPlan] = []
    for entry in buckets:
        samples = list(entry.samples)
        if shuffle:
            python_random(seed, "bucket order", epoch, entry.dataset, *entry.bucket).shuffle(samples)
        size = entry.batch_size
        slices = [
            BatchPlan(entry.dataset, entry.bucket, tuple(samples[start : start + size]), 0)
            for start in range(0, len(samples), size)
        ]
        even = len(slices) - len(slices) % world_size
        whole += _in_groups(slices[:even], world_size)
        leftover += slices[even:]
    groups = whole + _in_groups(leftover, world_size)
    if shuffle:
        python_random(seed, "batch order", epoch).shuffle(groups)
    return groups


def batches_per_epoch(counts: Sequence[tuple[int, int]], world_size: int) -> int:
    """Batches of each process per epoch; ``counts`` holds (samples, batch size) of every bucket."""
    slices = [-(-samples // batch_size) for samples, batch_size in counts]
    whole = sum(number // world_size for number in slices)
    leftover = sum(number % world_size for number in slices)
    return whole + -(-leftover // world_size)


def _in_groups(slices: list[BatchPlan], world_size: int) -> list[list[BatchPlan]]:
    return [slices[start : start + world_size] for start in range(0, len(slices), world_size)]


def _member(group: list[BatchPlan], rank: int) -> BatchPlan:
    """The batch of ``rank``; when the last group is too short, its first batch again as padding."""
    total = sum(len(plan.samples) for plan in group)
    if rank < len(group):
        return replace(group[rank], group_size=total)
    return replace(group[0], group_size=total, padding=True)

"""Batches prepared ahead of training by worker threads, handed out in order.

Loading a batch is a pure function of its plan, so the number of workers changes nothing but the speed. Decoding,
resizing and reading files release Python's global lock, so threads work side by side without the cost of processes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from library.data.batch import Batch
from library.data.order import BatchPlan

if TYPE_CHECKING:
    from library.data.dataset import DatasetGroup

BATCHES_AHEAD_PER_WORKER = 2


class BatchLoader:
    """Loads the batches of plans with ``workers`` threads (0: in the calling thread); a context manager.

    The threads live until ``close``, across epochs. With ``pin_memory`` batches arrive in page-locked memory.
    """

    def __init__(self, group: DatasetGroup, *, workers: int, pin_memory: bool = False) -> None:
        self.group = group
        self.workers = min(workers, os.cpu_count() or 1)
        self.pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="batch-loader") if self.workers > 0 else None

    def batches(
        self,
        plans: Sequence[BatchPlan],
        *,
        epoch: int,
        seed: int,
        max_train_steps: int,
        step_of: Callable[[int], int],
        start: int = 0,
    ) -> Iterator[tuple[int, Batch]]:
        """(index, batch) for each plan from index ``start`` on.

        ``epoch`` counts from 1; ``step_of(index)`` is the number of updates done when that batch is trained. An error
        in a worker is raised here, at its batch, with the file's name.
        """

        def load(index: int) -> Batch:
            step = step_of(index)
            batch = self.group.load(plans[index], epoch=epoch, step=step, max_train_steps=max_train_steps, seed=seed)
            return batch.pin_memory() if self.pin_memory else batch

        indices = range(start, len(plans))
        if self._pool is None:
            return ((index, load(index)) for index in indices)
        return prefetch(self._pool, load, indices, self.workers * BATCHES_AHEAD_PER_WORKER)

    def close(self) -> None:
        """Stop the threads; batches not yet begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def prefetch(
    pool: ThreadPoolExecutor, load: Callable[[Any], Any], keys: Sequence[Any] | range, ahead: int
) -> Iterator[tuple[Any, Any]]:
    """(key, load(key)) in order, with at most ``ahead`` results waiting or in the making."""
    pending: deque[tuple[Any, Future[Any]]] = deque()
    remaining = iter(keys)
    try:
        for key in remaining:
            pending.append((key, pool.submit(load, key)))
            if len(pending) >= ahead:
                break
        while pending:
            key, future = pending.popleft()
            result = future.result()
            for following in remaining:
                pending.append((following, pool.submit(load, following)))
                break
            yield key, result
    finally:
        for _, future in pending:
            future.cancel()

"""The images and captions that a run trains on and validates with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.console import say
from library.data.build import build_dataset_groups
from library.data.summary import summarize
from library.training.training_options import TrainingOptions

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.data.dataset import DatasetGroup
    from library.data.loader import BatchLoader
    from library.training.plan.lengths import RunPlan
    from library.training.progress import Progress


@dataclass(frozen=True)
class TrainingData:
    """Two groups of data sets."""

    train: DatasetGroup
    validation: DatasetGroup | None
    seed: int
    """Of the order of batches and of every draw on an item."""
    validation_seed: int

    @property
    def groups(self) -> list[DatasetGroup]:
        """Those that are there."""
        return [group for group in (self.train, self.validation) if group is not None]

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """Width and height of the buckets that are trained."""
        return {size for dataset in self.train.datasets for size in dataset.bucket_samples()}

    def batches(
        self, loader: BatchLoader, plan: RunPlan, progress: Progress, process: int, processes: int
    ) -> Iterator[tuple[int, Batch]]:
        """Number and content of the present epoch's micro-batches of this process, from the present position on."""
        epoch, first = progress.position.epoch, progress.position.batch
        start = progress.step - first // plan.accumulation
        return loader.batches(
            self.train.plan(epoch + 1, self.seed, process, processes),
            epoch=epoch + 1,
            seed=self.seed,
            max_train_steps=plan.max_steps,
            step_of=lambda index: start + index // plan.accumulation,
            start=first,
        )

    def validation_batches(
        self, loader: BatchLoader, limit: int | None, process: int, processes: int
    ) -> Iterator[tuple[int, Batch]]:
        """The validation batches of this process, at most ``limit``, the same every time."""
        assert self.validation is not None
        plans = self.validation.plan(0, self.validation_seed, process, processes)[:limit]
        return loader.batches(plans, epoch=0, seed=self.validation_seed, max_train_steps=1, step_of=lambda _: 0)


def read_training_data(
    options: TrainingOptions,
    *,
    seed: int,
    processes: int,
    bucket_divisor: int,
    size_divisor: int,
    control_images: bool,
) -> TrainingData:
    """Read the dataset description, list images and captions, and say what was found. Raises UserError."""
    validation = options.validation
    validation_seed = seed if validation.validation_seed is None else validation.validation_seed
    groups = build_dataset_groups(
        options.dataset,
        bucket_divisor=bucket_divisor,
        size_divisor=size_divisor,
        cache=options.cache,
        validation_split=validation.validation_split,
        validation_seed=validation_seed,
        seed=seed,
        control_images=control_images,
        read_only=options.preflight.dry_run,
    )
    data = TrainingData(*groups, seed, validation_seed)
    for title, group in zip(("Training data", "Validation data"), data.groups):
        say(summarize(group, title, processes))
    return data

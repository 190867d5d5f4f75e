"""The metadata of the files that a run writes, gathered when it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.data.metadata import dataset_metadata, trigger_phrase
from library.options import all_values
from library.training.network.contract import parse_network_args
from library.training.optim.ema import MovingAverage
from library.training.output.metadata import (
    BackgroundHashes,
    SessionFacts,
    at_step,
    modelspec_metadata,
    modelspec_resolution,
    training_metadata,
)
from library.training.run_facts import RunFacts


@dataclass(frozen=True)
class ModelFacts:
    """What a family says of its model."""

    entries: Mapping[str, Any]
    """The ``ss_*`` entries that only this family writes."""
    architecture: str
    """``modelspec.architecture`` without ``/lora``."""
    implementation: str
    """``modelspec.implementation``."""
    prediction_type: str | None
    """``modelspec.prediction_type``."""
    side: int
    """Side of the square in a file's metadata when ``--resolution`` is not given."""


class FileMetadata:
    """What a run's files say about it; the hashes of the base model are computed beside the training."""

    def __init__(self, run: RunFacts, model: ModelFacts) -> None:
        self.options, self.model = run.options, model
        self.hashes = BackgroundHashes(
            sd_model=run.options.model.pretrained_model_name_or_path, vae=run.options.vae.vae
        )
        self.trigger_phrase = trigger_phrase(run.data.train)
        dataset = dataset_metadata(run.data.train, run.options.dataset, world_size=run.processes)
        self.entries = training_metadata(all_values(run.options), session_facts(run), dataset, model.entries)

    def at(self, step: int, epoch: int, average: MovingAverage | None = None) -> dict[str, str]:
        """The metadata of a file that is saved now: after ``step`` updates, as the file of ``epoch``.

        ``average``: that of which it holds the weights, if it does.
        """
        options = self.options
        modelspec = modelspec_metadata(
            options.metadata,
            architecture=self.model.architecture,
            implementation=self.model.implementation,
            output_name=options.saving.output_name,
            resolution=modelspec_resolution(options.dataset.resolution, self.model.side),
            prediction_type=self.model.prediction_type,
            timestep_range=(options.noise.min_timestep, options.noise.max_timestep),
            clip_skip=options.clip_skip.clip_skip,
            trigger_phrase=self.trigger_phrase,
        )
        entries = {**self.entries, **self.hashes.entries()}
        if average is not None:
            entries |= {"ss_ema_decay": str(average.decay), "ss_ema_updates": str(average.updates)}
            modelspec["modelspec.title"] += " (moving average)"
        return at_step(entries, step, epoch, options.metadata.no_metadata, modelspec)


def session_facts(run: RunFacts) -> SessionFacts:
    """What the metadata says about a run beyond its options."""
    network, data = run.options.network, run.data
    return SessionFacts(
        session_id=run.progress.session_id,
        started_at=run.progress.started_at,
        seed=run.seed,
        optimizer=run.optimization.created,
        max_train_steps=run.plan.max_steps,
        num_batches_per_epoch=run.plan.batches_per_epoch,
        num_epochs=run.plan.epochs,
        num_train_images=data.train.train_image_count,
        num_reg_images=data.train.reg_image_count,
        num_validation_images=0 if data.validation is None else data.validation.train_image_count,
        network_args=parse_network_args(network) if network.network_args else None,
    )

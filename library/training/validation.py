"""Validation loss: the same items, noise levels and noise every time, so that only the network changes the number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from library.data.loader import BatchLoader
from library.training.distribution import mean_over_processes
from library.training.objective.step_inputs import ItemDraws
from library.training.validation_options import ValidationOptions

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch
    from library.training.data import TrainingData
    from library.training.step_loss import StepLoss

TIMESTEPS = 4


def validation_timesteps(min_timestep: int | None, max_timestep: int | None) -> list[int]:
    """The four timesteps (0..1000) at which every item is evaluated: evenly inside the trained range.

    These are the inner points of six evenly spaced ones, rounded down: 200, 400, 600, 800 for the whole range.
    """
    low = 0 if min_timestep is None else min_timestep
    high = 1000 if max_timestep is None else max_timestep
    return [int(low + (high - low) * i / (TIMESTEPS + 1)) for i in range(1, TIMESTEPS + 1)]


def due_after_step(options: ValidationOptions, step: int) -> bool:
    """Whether validation follows ``step``."""
    return bool(options.validate_every_n_steps) and step % options.validate_every_n_steps == 0  # type: ignore[operator]


def due_after_epoch(options: ValidationOptions, epoch: int) -> bool:
    """Whether validation follows ``epoch`` (1-based)."""
    return epoch % (options.validate_every_n_epochs or 1) == 0


def average_loss(
    data: TrainingData, loss: StepLoss, timesteps: list[int], limit: int | None, workers: int, accelerator: Any
) -> float:
    """The mean loss over the validation items of all processes, of at most ``limit`` batches of each."""
    assert data.validation is not None
    process, processes = accelerator.process_index, accelerator.num_processes
    with BatchLoader(data.validation, workers=workers) as loader:
        batches = data.validation_batches(loader, limit, process, processes)
        sums = validation_loss((batch for _, batch in batches), loss, timesteps, data.validation_seed)
    total, count = sums
    if processes > 1:
        import torch

        total, count = mean_over_processes(torch.tensor(sums, device=accelerator.device), accelerator).tolist()
    return total / max(count, 1e-12)


def validation_loss(
    batches: Iterable[Batch], item_losses: Callable[[Batch, ItemDraws, int], Tensor], timesteps: list[int], seed: int
) -> tuple[float, float]:
    """Sum of the losses over all items and timesteps, and how many there are (padding does not count).

    ``item_losses(batch, draws, timestep)`` returns [batch]. An item's noise depends on ``seed`` and the item alone.
    """
    total = count = 0.0
    for batch in batches:
        draws = ItemDraws(seed, 0, batch.item_ids)
        for timestep in timesteps:
            losses = item_losses(batch, draws, timestep).cpu() * batch.loss_weights
            total += losses.sum().item()
            count += batch.loss_weights.count_nonzero().item()
    return total, count

"""Validation loss: the same items, noise levels and noise every time, so that only the network changes the number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.errors import UserError
from library.training.objective.step_inputs import ItemDraws

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch

TIMESTEPS = 4


@dataclass
class ValidationOptions:
    """Validation"""

    validation_split: float = 0.0
    """Share of each data set that is kept for validation, 0 to 1; a dataset configuration may say its own."""
    validation_seed: int | None = None
    """Seed of the split and of the validation noise; unset means --seed."""
    validate_every_n_steps: int | None = None
    """Validate every N steps, besides the epochs."""
    validate_every_n_epochs: int | None = None
    """Validate every N epochs; unset means every epoch."""
    max_validation_steps: int | None = None
    """Use at most this many validation batches."""


def check_validation_options(options: ValidationOptions) -> None:
    """Raises UserError for values out of range."""
    if not 0 <= options.validation_split <= 1:
        raise UserError(f"--validation_split must be between 0 and 1, not {options.validation_split}.")
    for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")


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

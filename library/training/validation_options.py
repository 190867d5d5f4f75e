"""The options of validation."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import UserError


@dataclass
class ValidationOptions:
    """Validation"""

    validation_split: float = 0.0
    """Share of each data set that is kept for validation, 0 to 1; a dataset configuration may say its own."""
    validation_seed: int | None = None
    """Seed of the split and of the validation noise; unset means --seed."""
    validate_every_n_steps: int | None = None
    """Also validate every N steps, in addition to epochs."""
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

"""Options that other programs accept though they cannot act as given; what is meant takes their place, with a line."""

from __future__ import annotations

from library.console import say
from library.training.training_options import TrainingOptions


def adjust_options(options: TrainingOptions) -> None:
    """Replace such options in place, before they are checked."""
    schedule = options.lr_scheduler
    if schedule.lr_scheduler == "constant" and schedule.lr_warmup_steps and not schedule.lr_scheduler_type:
        say("--lr_scheduler constant with --lr_warmup_steps is constant_with_warmup")
        schedule.lr_scheduler = "constant_with_warmup"
    if options.model.xformers:
        from library.models.attention import or_torch

        options.model.xformers = or_torch("xformers", "--xformers") == "xformers"

"""Everything about a run that is known from its options alone."""

from __future__ import annotations

from library.errors import UserError
from library.families import by_options
from library.memory.streaming_options import check_streaming_options
from library.training.finiteness import check_nonfinite_options
from library.training.launch import WHOLE_MODEL, check_launch
from library.training.network.contract import check_network_options
from library.training.objective.losses import check_loss_options
from library.training.objective.noise_options import check_noise_options
from library.training.optim.lr_schedulers import check_lr_scheduler_options
from library.training.optim.optimizers import check_optimizer_options
from library.training.output.hub import check_hub_options
from library.training.plan.lengths import check_lengths
from library.training.run_options import ModelOptions, check_compiler, check_precision
from library.training.tracking import check_logging_options
from library.training.training_options import TrainingOptions
from library.training.validation_options import check_validation_options


def check_training_options(options: TrainingOptions) -> None:
    """Raises UserError for values and combinations that no family can train with."""
    check_precision(options.precision)
    check_compiler(options.precision)
    check_streaming_options(options.streaming, options.precision.cpu_offload_checkpointing)
    check_lengths(options.length)
    check_network_options(options.network, by_options(options))
    check_optimizer_options(
        options.optimizer, options.length.gradient_accumulation_steps, options.precision.mixed_precision
    )
    check_lr_scheduler_options(options.lr_scheduler)
    check_nonfinite_options(options.nonfinite)
    check_loss_options(options.loss)
    check_noise_options(options.noise)
    check_validation_options(options.validation)
    check_logging_options(options.logging, read_only=options.preflight.dry_run)
    check_hub_options(options.hub, options.resume.resume)
    if options.distribution.deepspeed:
        raise UserError(f"--deepspeed is not supported: {WHOLE_MODEL}.")
    check_launch(options.precision, options.streaming)
    require_model(options.model)
    if options.preflight.dry_run and options.dataset.debug_dataset:
        raise UserError("--dry_run writes nothing and --debug_dataset writes a page: leave out one of them.")


def require_model(options: ModelOptions) -> None:
    """Raises UserError when no base model is named."""
    if not options.pretrained_model_name_or_path:
        raise UserError("--pretrained_model_name_or_path is missing; name the base model's file.")

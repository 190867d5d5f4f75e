"""Options that change nothing beside the others that were given, so that none is ignored in silence.

Each rule says when it holds, why, and for which options. What only one family leaves out is reported by that family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from library.memory.streaming_options import StreamingOptions
from library.training.objective.losses import LossOptions
from library.training.optim.lr_schedulers import unused_schedule_options
from library.training.run_options import DistributionOptions, PrecisionOptions
from library.training.tracking import LoggingOptions, logging_targets

Rule = tuple[bool, str, Sequence[str]]
"""Whether the options (third) are without effect, and the reason: "without --x", "beside --y", "with --z"."""


def unused_options(options: Any) -> list[tuple[str, Sequence[str]]]:
    """Reasons and names (without --) of options that would change nothing, whether they are given or not.

    ``options`` is a script's combination of option groups (``TrainingOptions``).
    """
    rules: list[Rule] = [
        *_precision(options.precision),
        *_streaming(options.streaming, options.precision.vram_budget is not None),
        (options.model.xformers, "beside --xformers", ["sdpa"]),
        *_distribution(options.distribution),
        (options.nonfinite.on_nonfinite != "skip", "without --on_nonfinite skip", ["max_nonfinite_steps"]),
        *_length_and_resume(options),
        *_saving(options),
        *_network(options),
        *_loss(options.loss),
        *_samples(options),
        *_data(options),
        *_logging(options.logging),
    ]
    found = [(reason, names) for holds, reason, names in rules if holds]
    return found + list(unused_schedule_options(options.lr_scheduler))


def _precision(precision: PrecisionOptions) -> Iterator[Rule]:
    compiles = precision.torch_compile
    yield precision.fp8_base_unet, "beside --fp8_base_unet", ["fp8_base"]
    yield precision.fp8_scaled and not precision.fp8_base, "beside --fp8_scaled", ["fp8_base_unet"]
    yield not precision.fp8_scaled, "without --fp8_scaled", ["fp8_scaled_granularity"]
    checkpoints = ["cpu_offload_checkpointing", "keep_attention_outputs"]
    yield not precision.gradient_checkpointing, "without --gradient_checkpointing", checkpoints
    compiler = ["compile_dynamic", *(["dynamo_backend"] if precision.dynamo_backend != "no" else [])]
    yield not compiles, "without --torch_compile", compiler
    yield compiles and precision.dynamo_backend == "no", "with --dynamo_backend no", ["torch_compile"]


def _streaming(streaming: StreamingOptions, may_stream: bool) -> Iterator[Rule]:
    yield True, "(blocks are only ever copied to the device)", ["block_swap_h2d_only"]
    names = ["block_swap_ring_size", "use_pinned_memory_for_block_swap"]
    streams = streaming.blocks_to_swap or streaming.stream_text_encoders or may_stream
    yield not streams, "without --blocks_to_swap", names


def _distribution(distribution: DistributionOptions) -> Iterator[Rule]:
    names = "zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device "
    names += "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients"
    yield not distribution.deepspeed, "without --deepspeed", names.split()


def _length_and_resume(options: Any) -> Iterator[Rule]:
    yield options.length.max_train_epochs is not None, "beside --max_train_epochs", ["max_train_steps"]
    yield options.resume.initial_step is not None, "beside --initial_step", ["initial_epoch"]


def _saving(options: Any) -> Iterator[Rule]:
    saving, hub = options.saving, options.hub
    epochs = saving.save_every_n_epochs or saving.save_n_epoch_ratio
    states = ["save_last_n_epochs_state", "save_last_n_steps_state"]
    yield bool(saving.save_n_epoch_ratio), "beside --save_n_epoch_ratio", ["save_every_n_epochs"]
    yield not epochs, "without --save_every_n_epochs", ["save_last_n_epochs", states[0]]
    yield not saving.save_every_n_steps, "without --save_every_n_steps", ["save_last_n_steps", states[1]]
    yield not saving.save_state, "without --save_state", states
    without_metadata = saving.save_model_as != "safetensors"
    names = [name for name in vars(options.metadata) if name.startswith("metadata_")]
    yield without_metadata, f"with --save_model_as {saving.save_model_as}", ["training_comment", "no_metadata", *names]
    yield options.metadata.no_metadata, "with --no_metadata", ["training_comment"]
    uploads = ["huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload"]
    uploads += ["save_state_to_huggingface"]
    uploads += [] if hub.resume_from_huggingface else ["huggingface_token"]
    yield not hub.huggingface_repo_id, "without --huggingface_repo_id", uploads
    no_states = not (saving.save_state or saving.save_state_on_train_end)
    yield no_states, "without --save_state or --save_state_on_train_end", ["save_state_to_huggingface"]


def _network(options: Any) -> Iterator[Rule]:
    network = options.network
    yield network.dim_from_weights, "with --dim_from_weights", ["network_dim", "network_alpha"]
    yield network.network_train_unet_only, "with --network_train_unet_only", ["text_encoder_lr"]
    yield network.network_train_text_encoder_only, "with --network_train_text_encoder_only", ["unet_lr"]


def _loss(loss: LossOptions) -> Iterator[Rule]:
    plain = loss.loss_type not in ("huber", "smooth_l1")
    yield plain, f"with --loss_type {loss.loss_type}", ["huber_schedule", "huber_c", "huber_scale"]


def _samples(options: Any) -> Iterator[Rule]:
    samples = options.samples
    epochs = samples.sample_every_n_epochs
    none = not (samples.sample_at_first or samples.sample_every_n_steps or epochs)
    yield bool(epochs), "beside --sample_every_n_epochs", ["sample_every_n_steps"]
    yield none, "without --sample_every_n_epochs", ["sample_prompts", "sample_sampler"]


def _data(options: Any) -> Iterator[Rule]:
    cache, text = options.cache, getattr(options, "text_cache", None)
    latents = cache.cache_latents or cache.cache_latents_to_disk
    texts = text is not None and (text.cache_text_encoder_outputs or text.cache_text_encoder_outputs_to_disk)
    on_disk = cache.cache_latents_to_disk or (text is not None and text.cache_text_encoder_outputs_to_disk)
    yield True, "(the loader's threads always stay)", ["persistent_data_loader_workers"]
    yield not latents, "without --cache_latents", ["vae_batch_size"]
    yield not texts, "without --cache_text_encoder_outputs", ["text_encoder_batch_size"]
    yield not on_disk, "without --cache_latents_to_disk", ["skip_cache_check"]


def _logging(logging: LoggingOptions) -> Iterator[Rule]:
    targets = logging_targets(logging)
    wandb = ["wandb_run_name", "log_tracker_config", "wandb_api_key"]
    yield not targets, "without --logging_dir", ["log_prefix", "log_tracker_name", "log_config"]
    yield not logging.logging_dir, "without --logging_dir", ["log_prefix"]
    yield "wandb" not in targets, "without --log_with wandb", wandb
    yield logging.log_tracker_config is not None, "beside --log_tracker_config", ["wandb_run_name"]

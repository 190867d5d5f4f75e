"""An option that changes nothing beside the others is said to, with the reason; one that does is not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.options import declared_options, parse_options
from library.training.plan.unused_options import unused_options
from train_network import StableDiffusionNetworkTrainer, StableDiffusionTrainingOptions

NEEDED = ["--pretrained_model_name_or_path", "model.safetensors", "--network_module", "networks.lora"]


@pytest.fixture
def unused(caplog, tmp_path):
    """What is said to have no effect, by reason, before anything but the options is looked at."""
    save_file({"lora_unet_x.alpha": torch.ones(())}, tmp_path / "w.safetensors")
    (tmp_path / "tracker.toml").write_text("[wandb]\n", encoding="utf-8")

    def check(arguments: str) -> dict[str, list[str]]:
        given = [*NEEDED, *arguments.replace("TMP", str(tmp_path)).split()]
        trainer = StableDiffusionNetworkTrainer(parse_options(StableDiffusionTrainingOptions, "test", given))
        with caplog.at_level("INFO"):
            trainer.check_options()
        lines = [text.removeprefix("no effect ") for text in caplog.messages if text.startswith("no effect ")]
        said = {reason: names.split(", ") for reason, names in (line.rsplit(": ", 1) for line in lines)}
        assert sorted(f"--{name}" for name in trainer.no_effect) == sorted(
            name for line in said.values() for name in line
        )
        return said

    return check


DEEPSPEED = (
    "--zero_stage 3 --offload_optimizer_device cpu --offload_optimizer_nvme_path x --offload_param_device nvme"
    " --offload_param_nvme_path x --zero3_init_flag --zero3_save_16bit_model --fp16_master_weights_and_gradients"
)
UPLOADS = (
    "--huggingface_repo_type model --huggingface_path_in_repo a --huggingface_repo_visibility public --async_upload"
    " --save_state_to_huggingface --huggingface_token hf_x"
)
SCHEDULE = (
    "--lr_decay_steps 5 --lr_scheduler_num_cycles 2 --lr_scheduler_power 2 --lr_scheduler_timescale 5"
    " --lr_scheduler_min_lr_ratio 0.1"
)


@pytest.fixture(autouse=True)
def xformers_is_installed(monkeypatch):
    monkeypatch.setattr("library.models.attention.PACKAGES", {"xformers": "torch"})


def names(arguments: str) -> list[str]:
    """The options among arguments, without their values."""
    return [part for part in arguments.split() if part.startswith("--")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            f"--cpu_offload_checkpointing --keep_attention_outputs --dynamo_backend eager {DEEPSPEED}"
            " --compile_dynamic true"
            " --ddp_gradient_as_bucket_view --ddp_static_graph --persistent_data_loader_workers --xformers --sdpa"
            " --ip_noise_gamma_random_strength --block_swap_h2d_only --block_swap_ring_size 3",
            {
                "(blocks are only ever copied to the device)": "--block_swap_h2d_only",
                "without --blocks_to_swap": "--block_swap_ring_size",
                "without --gradient_checkpointing": "--cpu_offload_checkpointing --keep_attention_outputs",
                "without --torch_compile": "--compile_dynamic --dynamo_backend",
                "without --deepspeed": " ".join(names(DEEPSPEED)),
                "for Stable Diffusion": "--ddp_gradient_as_bucket_view --ddp_static_graph",
                "(the loader's threads always stay)": "--persistent_data_loader_workers",
                "beside --xformers": "--sdpa",
                "without --ip_noise_gamma": "--ip_noise_gamma_random_strength",
            },
        ),
        (
            "--torch_compile --dynamo_backend no --mixed_precision bf16 --fp8_base --fp8_base_unet"
            " --fp8_scaled_granularity tensor"
            " --mem_eff_attn --sdpa --max_train_epochs 2 --max_train_steps 5 --initial_step 2 --initial_epoch 3",
            {
                "with --dynamo_backend no": "--torch_compile",
                "beside --fp8_base_unet": "--fp8_base",
                "without --fp8_scaled": "--fp8_scaled_granularity",
                "beside --mem_eff_attn": "--sdpa",
                "beside --max_train_epochs": "--max_train_steps",
                "beside --initial_step": "--initial_epoch",
            },
        ),
        (
            f"--save_last_n_epochs 2 --save_last_n_steps 2 {UPLOADS} --huber_schedule constant --huber_c 0.2"
            " --huber_scale 2 --sample_prompts p.txt --sample_sampler euler",
            {
                "without --save_every_n_epochs": "--save_last_n_epochs",
                "without --save_every_n_steps": "--save_last_n_steps",
                "without --huggingface_repo_id": " ".join(names(UPLOADS)),
                "with --loss_type l2": "--huber_schedule --huber_c --huber_scale",
                "without --sample_every_n_epochs": "--sample_prompts --sample_sampler",
            },
        ),
        (
            "--save_n_epoch_ratio 2 --save_every_n_epochs 2 --save_every_n_steps 2 --save_last_n_steps_state 2"
            " --save_last_n_epochs_state 1 --huggingface_repo_id a/b --save_state_to_huggingface"
            " --save_model_as pt --training_comment x --no_metadata --metadata_title x --metadata_author x",
            {
                "beside --save_n_epoch_ratio": "--save_every_n_epochs",
                "without --save_state": "--save_last_n_epochs_state --save_last_n_steps_state",
                "with --save_model_as pt": "--training_comment --no_metadata --metadata_title --metadata_author",
                "without --save_state or --save_state_on_train_end": "--save_state_to_huggingface",
            },
        ),
        (
            "--no_metadata --training_comment x --metadata_title y --save_state --save_last_n_epochs_state 2"
            " --mixed_precision bf16 --fp8_scaled --fp8_base_unet"
            " --network_train_unet_only --text_encoder_lr 1e-4"
            " --dim_from_weights --network_weights TMP/w.safetensors --network_dim 8 --network_alpha 4",
            {
                "with --no_metadata": "--training_comment",
                "beside --fp8_scaled": "--fp8_base_unet",
                "without --save_every_n_epochs": "--save_last_n_epochs_state",
                "with --network_train_unet_only": "--text_encoder_lr",
                "with --dim_from_weights": "--network_dim --network_alpha",
            },
        ),
        (
            "--network_train_text_encoder_only --unet_lr 1e-4 --sample_every_n_epochs 1 --sample_every_n_steps 5"
            " --sample_prompts p.txt --vae_batch_size 4 --text_encoder_batch_size 4 --skip_cache_check"
            f" --log_prefix a --log_tracker_name b --log_config {SCHEDULE}",
            {
                "with --network_train_text_encoder_only": "--unet_lr",
                "beside --sample_every_n_epochs": "--sample_every_n_steps",
                "without --cache_latents": "--vae_batch_size",
                "without --cache_text_encoder_outputs": "--text_encoder_batch_size",
                "without --cache_latents_to_disk": "--skip_cache_check",
                "without --logging_dir": "--log_prefix --log_tracker_name --log_config",
                "with --lr_scheduler constant": " ".join(names(SCHEDULE)),
            },
        ),
        (
            "--logging_dir TMP --wandb_run_name a --log_tracker_config TMP/tracker.toml --wandb_api_key b"
            " --lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=5 --lr_scheduler cosine",
            {
                "without --log_with wandb": "--wandb_run_name --log_tracker_config --wandb_api_key",
                "beside --lr_scheduler_type": "--lr_scheduler",
            },
        ),
    ],
)
def test_what_changes_nothing_is_said_with_the_reason(unused, arguments, expected):
    assert unused(arguments) == {reason: listed.split() for reason, listed in expected.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        "--dynamo_backend no --lr_warmup_steps 0 --metadata_title a --training_comment b"
        " --lr_scheduler inverse_sqrt --lr_scheduler_timescale 20",
        "--gradient_checkpointing --cpu_offload_checkpointing --torch_compile --dynamo_backend eager"
        " --save_every_n_epochs 1 --save_last_n_epochs 2 --save_state --save_last_n_epochs_state 1"
        " --huggingface_repo_id a/b --huggingface_token x --async_upload --save_state_to_huggingface"
        " --loss_type smooth_l1 --huber_schedule constant --huber_c 0.2 --huber_scale 2"
        " --sample_at_first --sample_prompts p.txt --sample_sampler euler"
        " --cache_latents_to_disk --vae_batch_size 4 --skip_cache_check"
        " --lr_scheduler warmup_stable_decay --lr_warmup_steps 2 --lr_decay_steps 3 --lr_scheduler_num_cycles 2"
        " --lr_scheduler_min_lr_ratio 0.1",
        "--resume a/b/c --resume_from_huggingface --huggingface_token x"
        " --lr_scheduler polynomial --learning_rate 1e-3 --lr_scheduler_power 2 --lr_warmup_steps 5"
        " --network_train_unet_only --unet_lr 1e-4 --cache_text_encoder_outputs --text_encoder_batch_size 4"
        " --logging_dir TMP --log_prefix a --log_tracker_name b --log_config",
    ],
)
def test_nothing_is_said_of_options_that_do_something(unused, arguments):
    assert unused(arguments) == {}


def test_rules_name_declared_options_only():
    options = StableDiffusionTrainingOptions()
    named = {name for _, names in unused_options(options) for name in names}
    assert named <= set(declared_options(StableDiffusionTrainingOptions))


def test_deepspeed_is_refused():
    options = parse_options(StableDiffusionTrainingOptions, "test", [*NEEDED, "--deepspeed", "--zero_stage", "3"])
    with pytest.raises(UserError, match="--deepspeed is not supported: it spreads what is trained"):
        StableDiffusionNetworkTrainer(options).check_options()

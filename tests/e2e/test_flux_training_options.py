"""Every group of options trains: short runs of the real trainer in this process, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from flux_train_network import FluxNetworkTrainer, FluxTrainingOptions
from library.errors import UserError
from library.options import parse_options
from tests.running import forget_accelerator

SMALL: dict[str, object] = {"resolution": 64, "bucket_reso_steps": 32, "min_bucket_reso": 32, "max_bucket_reso": 128}
"""The images at half their size."""


@pytest.fixture
def train(flux_command, dataset_toml, tmp_path):
    """Train a few steps with more options; returns the trainer when it is done."""

    def run(*arguments: object, steps: int = 2, output: str = "out", **dataset: object) -> FluxNetworkTrainer:
        forget_accelerator()
        given = [*flux_command, "--max_train_steps", steps, "--output_dir", tmp_path / output]
        given += ["--dataset_config", dataset_toml(**(SMALL | dataset)), "--max_data_loader_n_workers", "0", *arguments]
        trainer = FluxNetworkTrainer.of(parse_options(FluxTrainingOptions, "test", [str(value) for value in given]))
        trainer.train()
        return trainer

    return run


def trained_keys(path: Path) -> set[str]:
    """The first part of the names of modules whose up weights moved from zero."""
    moved = {key for key, tensor in load_file(path).items() if key.endswith("lora_up.weight") and tensor.any()}
    return {key.split("_")[1] for key in moved}


@pytest.mark.parametrize(
    "arguments",
    [
        "--model_prediction_type additive --min_timestep 200 --max_timestep 800 --loss_type smooth_l1 "
        "--huber_schedule exponential --huber_c 0.2 --disable_mmap_load_safetensors --lowram --noise_offset 0.1",
        "--mixed_precision bf16 --fp8_base_unet --cache_text_encoder_outputs --apply_t5_attn_mask --no_half_vae "
        "--cache_latents --vae_batch_size 3",
        "--mixed_precision bf16 --full_bf16 --optimizer_type Lion",
        pytest.param(
            "--optimizer_type Prodigy --learning_rate 1.0 --optimizer_args decouple=True", marks=pytest.mark.thorough
        ),
        "--optimizer_type AdamWScheduleFree --validation_split 0.2 --save_state",
        pytest.param("--optimizer_type DAdaptAdam --learning_rate 1.0", marks=pytest.mark.thorough),
        pytest.param(
            "--optimizer_type SGDNesterov --lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 2",
            marks=pytest.mark.thorough,
        ),
        "--lr_scheduler warmup_stable_decay --lr_warmup_steps 10% --lr_decay_steps 0.5 --lr_scheduler_min_lr_ratio 0.1 "
        "--scale_weight_norms 0.5 --network_dropout 0.2 --save_precision bf16",
        pytest.param(
            "--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=5 --clip_skip 2",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_short_run(train, tmp_path, arguments):
    trainer = train(*arguments.split(), "--logging_dir", tmp_path / "log")
    assert trainer.progress.step == trainer.plan.max_steps
    tensors = load_file(tmp_path / "out" / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--network_train_unet_only", {"unet"}),
        ("", {"unet", "te1"}),
        ("--network_args train_t5xxl=True --text_encoder_lr 1e-3 1e-4", {"unet", "te1", "te3"}),
        ("--network_args train_t5xxl=True --gradient_checkpointing", {"unet", "te1", "te3"}),
        ("--network_train_text_encoder_only", {"te1"}),
        ("--text_encoder_lr 0", {"unet"}),
    ],
)
def test_which_parts_are_trained(train, tmp_path, arguments, parts):
    train(*arguments.split(), steps=1)
    assert trained_keys(tmp_path / "out" / "last.safetensors") == parts


def test_cached_and_uncached_text_train_the_same(train, tmp_path):
    train("--cache_latents", steps=1, output="a")
    train("--cache_latents", "--cache_text_encoder_outputs", steps=1, output="b")
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("a", "b"))
    assert trained_keys(tmp_path / "b" / "last.safetensors") == {"unet", "te1"}
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-6)


def test_loader_threads_and_samples_change_nothing(train, tmp_path):
    prompts = tmp_path / "prompts.json"
    cat = {"prompt": "a cat", "width": 64, "height": 64, "sample_steps": 2, "seed": 3}
    prompts.write_text(json.dumps([cat, "x --s 1 --w 64 --h 64"]), encoding="utf-8")
    train(steps=4, output="a", flip_aug=True)
    more = ["--max_data_loader_n_workers", "3", "--sample_prompts", prompts, "--sample_every_n_steps", "2"]
    train(*more, "--sample_at_first", "--output_name", "named", steps=4, output="b", flip_aug=True)
    one = load_file(tmp_path / "a" / "last.safetensors")
    two = load_file(tmp_path / "b" / "named.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)
    names = sorted(path.name for path in (tmp_path / "b" / "sample").iterdir())
    moments = [name.split("_")[1] for name in names]
    assert moments == ["000002", "000002", "000004", "000004", "e000000", "e000000"]
    assert sum(name.endswith("_3.png") for name in names) == 3
    with Image.open(tmp_path / "b" / "sample" / next(name for name in names if name.endswith("_3.png"))) as image:
        assert image.size == (64, 64)


def test_a_lora_is_continued_merged_and_measured(train, tmp_path):
    train("--network_dim", "2", steps=1, output="first")
    first = tmp_path / "first" / "last.safetensors"
    continued = train("--network_weights", first, "--dim_from_weights", steps=1, output="second")
    shapes = {key: tensor.shape for key, tensor in load_file(first).items()}
    assert {key: tensor.shape for key, tensor in load_file(tmp_path / "second" / "last.safetensors").items()} == shapes
    assert continued.progress.step == 1
    train("--base_weights", first, "--base_weights_multiplier", "0.5", steps=1, output="third")
    with pytest.raises(UserError, match="no LoRA file"):
        train("--base_weights", tmp_path / "none.safetensors")


def test_pt_files_and_no_metadata(train, tmp_path):
    train("--save_model_as", "pt", output="pt")
    assert any(key.endswith("lora_down.weight") for key in torch.load(tmp_path / "pt" / "last.pt", weights_only=True))
    train("--no_metadata", "--training_comment", "secret", "--metadata_title", "My title", output="bare")
    with safe_open(tmp_path / "bare" / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    assert {key for key in metadata if key.startswith("ss_")} == {
        *("ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha")
    }
    assert metadata["modelspec.title"] == "My title" and len(metadata["sshs_model_hash"]) == 64


@pytest.mark.thorough
def test_files_of_steps_and_epochs_with_retention(train, tmp_path):
    arguments = ["--save_every_n_steps", "2", "--save_last_n_steps", "2", "--save_state", "--save_every_n_epochs", "1"]
    train(*arguments, steps=12)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in names if name.startswith("at-")} == {
        *(
            "at-step00000010.safetensors",
            "at-step00000010-state",
            "at-step00000012.safetensors",
            "at-step00000012-state",
        )
    }
    assert {"epoch-000001.safetensors", "epoch-000001-state", "last.safetensors", "last-state"} <= names


def test_initial_step_counts_on_and_skips_data(train, tmp_path):
    assert train("--initial_step", "9", steps=12, output="a").progress.step == 12
    skipped = train("--initial_step", "9", "--skip_until_initial_step", steps=12, output="b")
    assert skipped.plan.steps_per_epoch == 7
    # Steps 10, 11 and 12 of the uninterrupted run see batches 2, 3 and 4 of the second epoch.
    assert list(skipped.progress.record.losses) == [2, 3, 4]


def test_masked_loss_sees_only_what_the_mask_shows(train, image_folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for source in image_folder.glob("*.png"):
        with Image.open(source) as image:
            Image.new("RGB", image.size, (0, 0, 0)).save(masks / source.name)
    trainer = train("--masked_loss", subset={"conditioning_data_dir": masks.as_posix()})
    assert trainer.progress.record.average == 0.0


def test_alpha_masks_weight_the_loss(train, tmp_path):
    folder = tmp_path / "transparent"
    folder.mkdir()
    rng = numpy.random.default_rng(0)
    for number in range(2):
        pixels = rng.integers(0, 255, (128, 128, 4), dtype=numpy.uint8)
        pixels[..., 3] = 0
        Image.fromarray(pixels).save(folder / f"{number}.png")
    assert train(folder=folder, subset={"alpha_mask": True}, output="masked").progress.record.average == 0.0
    assert train(folder=folder, output="whole").progress.record.average > 0.0


def test_output_preservation_keeps_marked_items_at_the_base_model(train):
    trainer = train(subset={"custom_attributes": {"diff_output_preservation": True}}, steps=1)
    # At the first step the network changes nothing yet, so the base model's output is met exactly.
    assert trainer.progress.record.average == 0.0


def test_a_front_ends_configuration_file_runs_unchanged(train, tmp_path):
    path = tmp_path / "gui.toml"
    path.write_text(
        'epoch = 1\nnoise_offset_type = "Original"\nadditional_parameters = ""\ndynamo_backend = "no"\n'
        'save_precision = "bf16"\nnetwork_args = []\noptimizer_args = []\nlr_scheduler_args = []\nsample_prompts = ""\n'
        'max_grad_norm = 1\nnetwork_alpha = 2\nresolution = "128,128"\nwandb_run_name = ""\ntraining_comment = "hi"\n',
        encoding="utf-8",
    )
    train("--config_file", path)
    with safe_open(tmp_path / "out" / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_training_comment"], metadata["ss_network_alpha"]) == ("hi", "2.0")


def test_debug_dataset_prints_and_trains_nothing(train, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    train("--debug_dataset")
    printed = capsys.readouterr().out
    assert printed.count("a circle, number") == 12
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dataset.dataset.html"]


@pytest.mark.parametrize(
    "arguments",
    [
        "--use_pinned_memory_for_block_swap --stream_text_encoders --sample_every_n_steps 1 --sample_prompts PROMPTS",
        "--mixed_precision bf16 --fp8_base --gradient_checkpointing --block_swap_ring_size 1",
        pytest.param(
            "--base_weights WEIGHTS --network_dropout 0.2 --validation_split 0.5 --max_validation_steps 1",
            marks=pytest.mark.thorough,
        ),
        pytest.param("--network_module networks.oft_flux", marks=pytest.mark.thorough),
        pytest.param(
            "--network_module lycoris.kohya --network_args algo=lokr dora_wd=True preset=full",
            marks=pytest.mark.thorough,
        ),
        "--network_args ggpo_sigma=0.03 ggpo_beta=0.01 split_qkv=True in_dims=[4,2,2,2,4]",
        "--optimizer_type Adafactor --fused_backward_pass --optimizer_args relative_step=False --max_grad_norm 0",
    ],
)
def test_streamed_blocks_are_named_and_change_nothing(train, tmp_path, caplog, arguments):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle --w 64 --h 64 --s 2 --d 1 --l 3 --n blurry\n", encoding="utf-8")
    if "WEIGHTS" in arguments:
        train(output="first", steps=1)
    weights = tmp_path / "first" / "last.safetensors"
    given = arguments.replace("WEIGHTS", str(weights)).replace("PROMPTS", str(prompts)).split()
    with caplog.at_level("INFO"):
        trainer = train(*given, "--blocks_to_swap", "2", output="streamed")
    assert "--blocks_to_swap 2: 2 of 2 double_blocks and 2 of 2 single_blocks are streamed from" in caplog.text
    assert trainer.pipeline.applied[trainer.pipeline.denoiser].stream.loads > 4
    train(*given, output="whole")
    streamed, whole = (load_file(tmp_path / folder / "last.safetensors") for folder in ("streamed", "whole"))
    assert all(torch.equal(streamed[key], whole[key]) for key in whole)
    images = list((tmp_path / "whole").glob("sample/*.png"))
    assert len(images) == (2 if "PROMPTS" in arguments else 0)
    for image in images:
        twin = next((tmp_path / "streamed" / "sample").glob(f"{image.stem[:20]}*.png"))
        assert twin.read_bytes() == image.read_bytes()

"""Metadata of LoRA files: the keys and value formats of a recorded file, dataset entries, modelspec and hashes."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from flux_train_network import FluxFlowOptions
from library.console import LOGGER
from library.options import declared_options
from library.training.objective.losses import LossOptions
from library.training.objective.noise_options import NoiseOptions, StableDiffusionNoiseOptions
from library.training.optim.lr_schedulers import LRSchedulerOptions
from library.training.optim.optimizers import OptimizerOptions, create_optimizer
from library.training.output.metadata import (
    MINIMAL_KEYS,
    OPTIONS_USED,
    BackgroundHashes,
    MetadataOptions,
    SessionFacts,
    at_step,
    full_hash,
    legacy_hash,
    modelspec_metadata,
    modelspec_resolution,
    training_metadata,
)
from library.training.training_options import TrainingOptions

RECORDED = json.loads(
    (Path(__file__).parents[1] / "reference_data" / "lora_flux_metadata.json").read_text(encoding="utf-8")
)
DATASET = {key: RECORDED[key] for key in ("ss_datasets", "ss_tag_frequency", "ss_dataset_dirs")}


def run_options(**changes) -> dict:
    """The options of the recorded run; those of this room are the real groups."""
    groups = (
        OptimizerOptions(learning_rate=1e-3),
        LRSchedulerOptions(),
        LossOptions(),
        NoiseOptions(),
        StableDiffusionNoiseOptions(),
        FluxFlowOptions(
            timestep_sampling="shift", discrete_flow_shift=3.1582, model_prediction_type="raw", guidance_scale=1.0
        ),
        MetadataOptions(),
    )
    options = {name: value for group in groups for name, value in vars(group).items()}
    options |= {"output_name": "flux", "gradient_checkpointing": False, "gradient_accumulation_steps": 1}
    options |= {"network_module": "networks.lora_flux", "network_dim": 4, "network_alpha": 2.0, "network_dropout": None}
    options |= {"mixed_precision": "bf16", "full_fp16": False, "fp8_base": False, "fp8_base_unet": False}
    options |= {"lowram": False, "cache_latents": True, "v2": False, "clip_skip": None, "max_token_length": None}
    options |= {"prior_loss_weight": 1.0, "scale_weight_norms": None, "caption_dropout_rate": 0.0}
    options |= {"caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0, "face_crop_aug_range": None}
    options |= {"resize_interpolation": None, "validation_seed": None, "validation_split": 0.0}
    options |= {"max_validation_steps": None, "validate_every_n_epochs": None, "validate_every_n_steps": None}
    return options | changes


def facts(options: dict, **changes) -> SessionFacts:
    group = OptimizerOptions(**{name: options[name] for name in vars(OptimizerOptions())})
    created = create_optimizer(group, [torch.nn.Parameter(torch.zeros(2))], options["lr_scheduler"])
    values = {
        "session_id": 631210050,
        "started_at": 1795365132.5976684,
        "seed": 42,
        "optimizer": created,
        "max_train_steps": 12,
        "num_batches_per_epoch": 12,
        "num_epochs": 1,
        "num_train_images": 24,
    }
    return SessionFacts(**{**values, **changes})


def flux_entries(options: dict) -> dict:
    names = [*vars(FluxFlowOptions())]
    return {"ss_base_model_version": "flux1", "ss_model_type": "flux", "ss_apply_t5_attn_mask": False} | {
        f"ss_{name}": options[name] for name in names
    }


def flux_modelspec(**changes) -> dict[str, str]:
    arguments = {
        "architecture": "flux-1-dev",
        "implementation": "https://github.com/black-forest-labs/flux",
        "output_name": "flux",
        "resolution": (1024, 1024),
        "date": datetime.datetime(2026, 11, 22, 16, 35, 14, 123456),
    }
    options = changes.pop("options", MetadataOptions())
    return modelspec_metadata(options, **{**arguments, **changes})


def test_a_run_writes_the_keys_and_values_of_the_recorded_file(tmp_path):
    options = run_options()
    model = tmp_path / "flux.safetensors"
    model.write_bytes(b"x")
    constant = training_metadata(options, facts(options), DATASET, flux_entries(options))
    constant |= BackgroundHashes(sd_model=str(model), vae=None).entries()
    metadata = at_step(constant, 12, 1, False, flux_modelspec())
    ours_alone = {"ss_sd_model_hash", "ss_new_sd_model_hash", "ss_training_finished_at", "ss_sd_scripts_commit_hash"}
    ours_alone |= {"modelspec.implementation_version"}
    written_by_the_network = {"sshs_model_hash", "sshs_legacy_hash"}
    assert set(metadata) == set(RECORDED) - written_by_the_network
    different = {k: (v, RECORDED[k]) for k, v in metadata.items() if v != RECORDED[k] and k not in ours_alone}
    assert different == {}
    assert all(isinstance(value, str) for value in metadata.values())
    assert re.fullmatch(r"\d+\.\d+", metadata["ss_training_finished_at"])


def test_values_are_printed_as_python_prints_them():
    options = run_options(
        optimizer_args=["weight_decay=0.1", "betas=0.9,0.99"], text_encoder_lr=[5e-5, 5e-5], lr_warmup_steps=0.1
    )
    metadata = training_metadata(options, facts(options), DATASET, flux_entries(options))
    assert metadata["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
    assert metadata["ss_text_encoder_lr"] == "[5e-05, 5e-05]"
    assert metadata["ss_lr_warmup_steps"] == "0.1"
    assert metadata["ss_unet_lr"] == "None"
    assert "ss_network_args" not in metadata


def test_network_arguments_are_json_with_the_dropout():
    options = run_options(network_dropout=0.1)
    metadata = training_metadata(
        options, facts(options, network_args={"train_blocks": "single"}), DATASET, flux_entries(options)
    )
    assert json.loads(metadata["ss_network_args"]) == {"train_blocks": "single", "dropout": 0.1}


def test_adafactor_with_its_own_rate_is_recorded_as_such():
    pytest.importorskip("transformers")
    options = run_options(optimizer_type="Adafactor", unet_lr=1e-4)
    metadata = training_metadata(options, facts(options), DATASET, flux_entries(options))
    assert metadata["ss_learning_rate"] == metadata["ss_unet_lr"] == "None"
    assert metadata["ss_lr_scheduler"] == "adafactor:0.001"


def test_no_metadata_leaves_what_is_needed_to_use_the_file():
    options = run_options()
    run = facts(options, network_args={})
    metadata = at_step(training_metadata(options, run, DATASET, flux_entries(options)), 12, 1, True, flux_modelspec())
    assert set(metadata) == set(MINIMAL_KEYS) | set(flux_modelspec())


def test_a_missing_option_is_noticed():
    options = run_options()
    run = facts(options)
    del options["loss_type"]
    with pytest.raises(KeyError, match="loss_type"):
        training_metadata(options, run, DATASET, flux_entries(options))


def test_every_recorded_option_exists_in_the_training_script():
    assert set(declared_options(TrainingOptions)) >= OPTIONS_USED


def test_modelspec_holds_what_is_given_and_nothing_else():
    plain = flux_modelspec()
    assert "modelspec.prediction_type" not in plain
    assert plain["modelspec.date"] == "2026-11-22T16:35:14"
    given = flux_modelspec(
        options=MetadataOptions(metadata_title="T", metadata_author="A", metadata_trigger_phrase="sks"),
        prediction_type="epsilon",
        timestep_range=(None, 700),
        clip_skip=2,
        resolution=(512, 768),
    )
    assert {k.removeprefix("modelspec."): v for k, v in given.items() if plain.get(k) != v} == {
        "title": "T",
        "author": "A",
        "trigger_phrase": "sks",
        "prediction_type": "epsilon",
        "timestep_range": "0,700",
        "encoder_layer": "2",
        "resolution": "512x768",
    }
    assert flux_modelspec(output_name=None)["modelspec.title"].startswith("LoRA@")


def test_thumbnails_become_data_urls_and_a_missing_one_is_left_out(tmp_path, caplog):
    LOGGER.propagate = True
    image = tmp_path / "cover.png"
    image.write_bytes(b"\x89PNG...")
    url = flux_modelspec(options=MetadataOptions(metadata_thumbnail=str(image)))["modelspec.thumbnail"]
    assert url == "data:image/png;base64," + base64.b64encode(b"\x89PNG...").decode()
    missing = MetadataOptions(metadata_thumbnail=str(tmp_path / "none.jpg"))
    assert "modelspec.thumbnail" not in flux_modelspec(options=missing)
    assert "none.jpg cannot be read" in caplog.text


def test_resolution_of_the_command_line_is_width_by_height():
    assert modelspec_resolution(None) == (1024, 1024)
    assert modelspec_resolution("512") == (512, 512)
    assert modelspec_resolution("512,768") == (512, 768)


def test_hashes_are_those_of_the_file(tmp_path):
    content = bytes(range(256)) * 5000
    large, small = tmp_path / "large.bin", tmp_path / "small.bin"
    large.write_bytes(content)
    small.write_bytes(b"abc")
    assert legacy_hash(large) == hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert full_hash(large) == hashlib.sha256(content).hexdigest()
    assert legacy_hash(small) == "e3b0c442"  # nothing lies beyond 1 MiB
    assert (legacy_hash(tmp_path / "none"), full_hash(tmp_path)) == ("NOFILE", "IsADirectory")
    entries = BackgroundHashes(sd_model=str(large), vae="owner/name").entries()
    assert entries == {
        "ss_sd_model_name": "large.bin",
        "ss_sd_model_hash": legacy_hash(large),
        "ss_new_sd_model_hash": full_hash(large),
        "ss_vae_name": "owner/name",
    }

"""The commands and dataset files of the FLUX.1 guide train, with tiny weights in place of the paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.running import launch

SECTION_4 = """
  --save_model_as=safetensors
  --network_module=networks.lora_flux
  --network_dim=16
  --network_alpha=1
  --learning_rate=1e-4
  --optimizer_type=AdamW8bit
  --lr_scheduler=constant
  --sdpa
  --max_train_epochs=3
  --save_every_n_epochs=1
  --mixed_precision=bf16
  --gradient_checkpointing
  --guidance_scale=1.0
  --timestep_sampling=flux_shift
  --model_prediction_type=raw
  --blocks_to_swap=18
  --cache_text_encoder_outputs
  --cache_latents
""".split()


def model_options(tiny_flux) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={tiny_flux.transformer}",
        *(f"--clip_l={tiny_flux.clip_l}", f"--t5xxl={tiny_flux.t5xxl}", f"--ae={tiny_flux.autoencoder}"),
    ]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def scalar_values(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


@pytest.mark.slow
def test_the_basic_command_trains_and_saves_each_epoch(tiny_flux, dataset_toml, tmp_path):
    output = tmp_path / "out"
    result = launch(
        "flux_train_network.py",
        *model_options(tiny_flux),
        f"--dataset_config={dataset_toml()}",
        f"--output_dir={output}",
        "--output_name=my_flux_lora",
        *SECTION_4,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    names = sorted(path.name for path in output.iterdir())
    assert names == ["my_flux_lora-000001.safetensors", "my_flux_lora-000002.safetensors", "my_flux_lora.safetensors"]
    assert result.stderr.count("--blocks_to_swap has no effect yet") == 1
    found = metadata(output / "my_flux_lora.safetensors")
    assert found["ss_network_module"] == "networks.lora_flux"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("16", "1.0")
    assert found["modelspec.architecture"] == "flux-1-dev/lora"
    assert found["ss_optimizer"] == "bitsandbytes.optim.adamw.AdamW8bit"
    assert json.loads(found["ss_datasets"])[0]["num_train_images"] == 12


@pytest.mark.slow
def test_the_multi_resolution_toml_trains(flux_command, picture_folder, tmp_path, documented):
    path = tmp_path / "multi.toml"
    text = documented["multi_resolution"].replace("path/to/image/directory", picture_folder.as_posix())
    path.write_text(text.replace("1024, 1024", "256, 256").replace("768, 768", "320, 320"), encoding="utf-8")
    result = launch(
        "flux_train_network.py",
        *(*flux_command, "--dataset_config", path, "--output_dir", tmp_path / "out", "--max_train_steps", "12"),
        *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"),
        accelerate=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for dataset, size in zip(json.loads(metadata(tmp_path / "out" / "last.safetensors")["ss_datasets"]), (2, 3)):
        assert dataset["batch_size_per_device"] == size
        assert dataset["subsets"][0]["flip_aug"] is True
    caches = list(picture_folder.glob("*_flux.npz"))
    assert len(caches) == 12 and len(list(picture_folder.glob("*_flux_te.npz"))) == 12
    for cache in [*caches, *picture_folder.glob("*_flux_te.npz")]:
        cache.unlink()


@pytest.mark.slow
def test_the_validation_toml_validates_the_same_every_time(flux_command, picture_folder, tmp_path, documented):
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        folder.mkdir()
        for source in picture_folder.glob("*.png"):
            (folder / source.name).write_bytes(source.read_bytes())
            (folder / f"{source.stem}.caption").write_text("a circle", encoding="utf-8")
    path = tmp_path / "validation.toml"
    text = documented["validation"].replace("1024, 1024", "256, 256")
    for name, folder in zip(("directory", "second-directory", "full_validation"), folders):
        text = text.replace(f'"path/to/image/{name}"', f'"{folder.as_posix()}"')
    path.write_text(text, encoding="utf-8")
    result = launch(
        "flux_train_network.py",
        *(*flux_command, "--dataset_config", path, "--output_dir", tmp_path / "out", "--max_train_epochs", "2"),
        *(
            "--logging_dir",
            tmp_path / "log",
            "--validate_every_n_steps",
            "5",
            "--cache_latents",
            "--learning_rate",
            "0",
        ),
        *("--max_validation_steps", "6", "--unet_lr", "1e-30", "--text_encoder_lr", "1e-30"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = metadata(tmp_path / "out" / "last.safetensors")
    assert (found["ss_num_train_images"], found["ss_num_validation_images"]) == ("23", "13")
    scalars = scalar_values(tmp_path / "log")
    steps = scalars["loss/validation/step_average"]
    assert [step for step, _ in steps] == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert [epoch for epoch, _ in scalars["loss/validation/epoch_average"]] == [1, 2]
    # Nothing was learned (rates of 1e-30), so every validation must say the same number.
    values = {round(value, 6) for _, value in [*steps, *scalars["loss/validation/epoch_average"]]}
    assert len(values) == 1
    for name in ("loss/current", "loss/average", "lr/unet", "loss/epoch_average"):
        assert name in scalars
    divergence = dict(scalars["loss/validation/step_divergence"])
    averages = dict(scalars["loss/average"])
    assert divergence[5] == pytest.approx(dict(steps)[5] - averages[5], abs=1e-5)

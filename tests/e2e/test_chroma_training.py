"""flux_train_network.py --model_type chroma: what is different from FLUX.1, through the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors import safe_open

from library.errors import UserError
from library.options import parse_options
from tests.running import run_in_process, trainer_class

FluxNetworkTrainer = trainer_class("flux")
PROMPT = "Japanese shrine in the summer forest. --n low quality, blurry --w 128 --h 128 --d 1 --l 4.0 --g 0.0 --s 2"


@pytest.fixture
def images(image_folder, tmp_path) -> Path:
    """A copy, so that cache files stay apart."""
    return Path(shutil.copytree(image_folder, tmp_path / "images"))


def trainer(*arguments: object):
    words = [str(word) for word in arguments]
    return FluxNetworkTrainer.of(parse_options(FluxNetworkTrainer.options_class, "", words))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def without(command: list[object], option: str, values: int = 1) -> list[object]:
    place = command.index(option)
    return [*command[:place], *command[place + 1 + values :]]


@pytest.mark.slow
def test_a_run_from_captions_to_samples(chroma_command, dataset_toml, images, tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPT, encoding="utf-8")
    command = without(without(chroma_command, "--apply_t5_attn_mask", 0), "--guidance_scale")
    done = run_in_process(
        "flux_train_network.py",
        *(*command, "--dataset_config", dataset_toml(images), "--output_dir", tmp_path / "out"),
        *("--output_name", "my_chroma_lora", "--max_train_steps", "3", "--gradient_checkpointing", "--clip_l", "none"),
        *("--cache_latents", "--cache_text_encoder_outputs_to_disk", "--mixed_precision", "bf16"),
        *("--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", "3", "--sample_at_first"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("--apply_t5_attn_mask is on: Chroma needs it") == 1
    assert done.stderr.count("--guidance_scale is 0, not 3.5: Chroma has no embedded guidance") == 1
    assert "for Chroma: --clip_l" in done.stderr
    said = metadata(tmp_path / "out" / "my_chroma_lora.safetensors")
    assert said["ss_base_model_version"] == said["ss_model_type"] == "chroma"
    assert (said["ss_guidance_scale"], said["ss_apply_t5_attn_mask"]) == ("0.0", "True")
    assert said["modelspec.architecture"] == "chroma/lora"
    assert said["modelspec.implementation"] == "https://huggingface.co/lodestones/Chroma"
    samples = sorted((tmp_path / "out" / "sample").glob("*.png"))
    assert len(samples) == 2
    first, last = (numpy.asarray(Image.open(path), dtype=int) for path in samples)
    assert abs(first - last).max() > 0, "the trained LoRA changes the image"
    entry = numpy.load(next(images.glob("*_flux_te.npz")))
    assert entry["l_pooled"].shape == (77, 1) and not entry["l_pooled"].any()
    assert bool(entry["apply_t5_attn_mask"]) and entry["t5_out"].shape[0] == 16


def test_cached_captions_train_the_same(chroma_command, dataset_toml, images, tmp_path):
    """From memory or from disk, with --network_train_unet_only or without, to the bit; peers' entries are read."""
    given = [*chroma_command, "--dataset_config", dataset_toml(images), "--max_train_steps", 3]
    files = []
    for number, extra in enumerate(
        (
            ["--cache_text_encoder_outputs"],
            ["--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"],
            ["--cache_text_encoder_outputs_to_disk"],
        )
    ):
        trainer(*given, *extra, "--output_dir", tmp_path / str(number)).train()
        with safe_open(tmp_path / str(number) / "last.safetensors", "pt") as file:
            files.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    for other in files[1:]:
        assert other.keys() == files[0].keys()
        assert all((other[key] == tensor).all() for key, tensor in files[0].items())
    assert len([key for key in files[0] if key.endswith("alpha")]) == 2 * 8 + 2 * 2


def test_padding_is_cut_and_changes_no_loss(chroma_command, dataset_toml, images, tmp_path):
    """Twice the caption length is only more padding, so that the losses are the same."""
    losses = []
    for length in (32, 64):
        command = [*without(chroma_command, "--t5xxl_max_token_length"), "--t5xxl_max_token_length", length]
        run = trainer(
            *command, "--dataset_config", dataset_toml(images), "--max_train_steps", 3,
            "--output_dir", tmp_path / str(length), "--logging_dir", tmp_path / f"log{length}",
        )  # fmt: skip
        run.train()
        losses.append(run.progress.record.average)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--network_train_text_encoder_only"],
            "--network_train_text_encoder_only: .*Chroma",
        ),
        (["--network_args", "train_t5xxl=True"], "train_t5xxl=True: .*Chroma"),
    ],
)
def test_text_encoders_are_not_trained(chroma_command, dataset_toml, tmp_path, arguments, sentence):
    run = trainer(*chroma_command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path, *arguments)
    with pytest.raises(UserError, match=sentence):
        run.train()


def test_another_guidance_is_replaced_and_said(chroma_command, dataset_toml, images, tmp_path, caplog):
    command = [*without(chroma_command, "--guidance_scale"), "--guidance_scale", 2]
    (tmp_path / "prompts.txt").write_text("a cat --g 3.5", encoding="utf-8")
    caplog.set_level("INFO")
    run = trainer(
        *command, "--dataset_config", dataset_toml(images), "--output_dir", tmp_path / "out", "--max_train_steps", 1,
        "--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 50,
    )  # fmt: skip
    run.train()
    assert "--guidance_scale is 0, not 2: Chroma has no embedded guidance" in caplog.text
    assert "sample prompts: guidance (--g) is 0 for Chroma" in caplog.text
    assert metadata(tmp_path / "out" / "last.safetensors")["ss_guidance_scale"] == "0.0"


def test_a_wrong_kind_of_file_is_named(chroma_command, flux_command, dataset_toml, tmp_path):
    for command, wanted in (
        ([*flux_command, "--model_type", "chroma"], "is a FLUX.1 file.*Give --model_type flux"),
        (
            without(chroma_command, "--model_type"),
            "is a Chroma file; a FLUX.1 transformer is needed.*--model_type chroma",
        ),
    ):
        run = trainer(*command, "--dataset_config", dataset_toml(), "--output_dir", tmp_path)
        with pytest.raises(UserError, match=wanted):
            run.train()


@pytest.mark.slow
def test_the_caching_tools_fill_the_caches_that_training_finds(chroma_command, dataset_toml, images, tmp_path):
    given = [*chroma_command, "--dataset_config", dataset_toml(images), "--output_dir", tmp_path / "out"]
    for script in ("tools/cache_latents.py", "tools/cache_text_encoder_outputs.py"):
        done = run_in_process(script, "--flux", *given)
        assert done.returncode == 0, done.stderr[-3000:]
    done = run_in_process(
        "flux_train_network.py",
        *(*given, "--max_train_steps", "1", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "latent cache: 12 kept, 0 made" in done.stderr and "text encoder cache: 12 kept, 0 made" in done.stderr

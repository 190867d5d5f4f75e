"""What a user can get wrong ends with one clear sentence and exit code 2, before models load, and writes nothing."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.running import launch, no_weights_are_read, run_in_process


def refused(*arguments: object, script: str = "flux_train_network.py") -> str:
    """Run the script, which must refuse before it reads a weight; returns its sentence."""
    with no_weights_are_read():
        result = run_in_process(script, *arguments)
    assert result.returncode == 2, f"exit {result.returncode}: {result.stderr[-2000:]}"
    lines = result.stderr.split("error: ", 1)
    assert len(lines) == 2, result.stderr
    return lines[1].strip()


@pytest.fixture
def given(flux_command, dataset_toml, tmp_path):
    return [
        *flux_command,
        "--dataset_config",
        dataset_toml(),
        "--output_dir",
        tmp_path / "out",
        "--max_train_steps",
        "1",
    ]


def without(arguments: list[object], option: str) -> list[object]:
    index = arguments.index(option)
    return [*arguments[:index], *arguments[index + 2 :]]


def test_misspelt_option(given):
    assert (
        refused(*given, "--optimiser_type", "AdamW")
        == "Unknown option --optimiser_type. Did you mean --optimizer_type?"
    )


def test_wrong_type(given):
    assert refused(*given, "--network_dim", "many") == "--network_dim must be a whole number, not 'many'."


@pytest.mark.parametrize("option", ["--output_dir", "--pretrained_model_name_or_path", "--network_module"])
def test_missing_option(given, option):
    assert refused(*without(given, option)).startswith(f"{option} is missing")


def test_missing_part(given):
    assert refused(*without(given, "--t5xxl")).startswith("--t5xxl is missing")


def test_missing_dataset(given):
    assert "no training data" in refused(*without(given, "--dataset_config"))


def test_toml_syntax_error_has_its_line(given, tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[[datasets]]\nresolution = 64\nbatch_size = \n", encoding="utf-8")
    sentence = refused(*without(given, "--dataset_config"), "--dataset_config", path)
    assert str(path) in sentence and "line 3" in sentence


def test_unknown_dataset_key_names_the_nearest(given, dataset_toml):
    path = dataset_toml(batchsize=2)
    sentence = refused(*given, "--dataset_config", path)
    assert "batchsize" in sentence and "batch_size" in sentence and str(path) in sentence


def test_wrong_type_in_dataset(given, dataset_toml):
    sentence = refused(*given, "--dataset_config", dataset_toml(batch_size="two"))
    assert "batch_size" in sentence and "two" in sentence


def test_no_images(given, dataset_toml, tmp_path):
    (tmp_path / "empty").mkdir()
    sentence = refused(*given, "--dataset_config", dataset_toml(tmp_path / "empty"))
    assert str(tmp_path / "empty") in sentence


def test_unreadable_images_are_all_listed(given, dataset_toml, tmp_path, image_folder):
    folder = tmp_path / "images"
    folder.mkdir()
    good = (image_folder / "00.png").read_bytes()
    (folder / "good.png").write_bytes(good)
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image", encoding="utf-8")
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    sentence = refused(*given, "--dataset_config", dataset_toml(folder))
    for name in ("zero.png", "text.jpg", "cut.png"):
        assert name in sentence
    assert "good.png" not in sentence


def test_missing_checkpoint(given, tmp_path):
    sentence = refused(*given, "--ae", tmp_path / "no.safetensors")
    assert "no.safetensors" in sentence and "--ae" in sentence


def test_truncated_checkpoint(given, tiny_flux, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(Path(tiny_flux.transformer).read_bytes()[:-1000])
    sentence = refused(*given, "--pretrained_model_name_or_path", path)
    assert "cut.safetensors" in sentence and "truncated" in sentence


def header_only(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A safetensors file of zeros with these tensors."""
    offset, header = 0, {}
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    return path


def test_checkpoint_of_another_family_is_named(given, tmp_path):
    path = header_only(
        tmp_path / "sdxl.safetensors",
        {
            "model.diffusion_model.input_blocks.0.0.weight": [4, 4, 3, 3],
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [4, 4],
            "model.diffusion_model.label_emb.0.0.weight": [4, 4],
            "conditioner.embedders.1.model.text_projection": [4, 4],
            "first_stage_model.decoder.conv_in.weight": [4, 4, 3, 3],
        },
    )
    assert "Stable Diffusion XL" in refused(*given, "--pretrained_model_name_or_path", path)


def test_text_encoder_given_as_autoencoder_is_named(given, tiny_flux):
    assert "CLIP" in refused(*given, "--ae", tiny_flux.clip_l)


def test_network_module_that_does_not_exist(given):
    sentence = refused(*given, "--network_module", "networks.lora_fluks")
    assert "networks.lora_fluks" in sentence and "networks.lora_flux" in sentence


def test_unknown_network_argument(given):
    sentence = refused(*given, "--network_args", "train_dubble_block_indices=all")
    assert "train_dubble_block_indices" in sentence and "train_double_block_indices" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--full_bf16"], "--full_bf16 needs --mixed_precision bf16"),
        (["--fp8_base"], "--fp8_base needs --mixed_precision"),
        (["--blocks_to_swap", "2", "--cpu_offload_checkpointing"], "are mutually exclusive"),
        (["--blocks_to_swap", "3"], "--blocks_to_swap 3: this model has 4 blocks, all of which are streamed with 2"),
        (["--blocks_to_swap", "auto"], "cpu has no memory of its own; give a number or --vram_budget"),
        (["--vram_budget", "0.5"], "the run does not fit into 0.5 GiB; --vram_budget 1 is the least"),
        (["--blocks_to_swap", "-1"], "--blocks_to_swap must not be negative, but is -1"),
        (["--keep_attention_outputs", "--gradient_checkpointing", "--torch_compile"], "are mutually exclusive"),
        (["--network_args", "train_t5xxl=True", "--cache_text_encoder_outputs"], "train_t5xxl"),
        (["--fused_backward_pass"], "Adafactor"),
        (["--lr_scheduler", "cosin"], "cosine"),
        (["--optimizer_type", "AdamX"], "Adam"),
        (["--mixed_precision", "fp16"], "needs a CUDA device"),
        (["--sample_every_n_steps", "1"], "--sample_prompts is missing"),
        (["--log_with", "tensorboard"], "--logging_dir"),
        (["--min_timestep", "900", "--max_timestep", "100"], "min_timestep"),
        (["--model_type", "chroma"], "is a FLUX.1 file; with --model_type chroma, a Chroma transformer is needed here"),
        (["--deepspeed"], "not supported"),
        (["--network_weights", "missing.safetensors"], "missing.safetensors"),
        (["--max_train_steps", "0"], "--max_train_steps must be at least 1"),
        (["--resume", "missing-state"], "there is no state folder missing-state"),
    ],
)
def test_forbidden_combinations(given, arguments, words):
    assert words in refused(*given, *arguments)


@pytest.mark.parametrize(
    "key", ["shuffle_caption = true", "caption_dropout_rate = 0.1", "caption_tag_dropout_rate = 0.1"]
)
def test_captions_that_change_cannot_be_cached(given, dataset_toml, key):
    name, value = key.split(" = ")
    path = dataset_toml(**{name: json.loads(value)})
    assert name in refused(*given, "--dataset_config", path, "--cache_text_encoder_outputs")


@pytest.mark.parametrize("name", ["color_aug", "random_crop"])
def test_augmentation_that_changes_pixels_cannot_be_cached(given, dataset_toml, name):
    assert name in refused(*given, "--dataset_config", dataset_toml(**{name: True}), "--cache_latents")


def test_bucket_steps_must_fit_the_model(given, dataset_toml):
    assert "bucket_reso_steps" in refused(*given, "--dataset_config", dataset_toml(bucket_reso_steps=24))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_unwritable_output_folder(given, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert "cannot write" in refused(*given, "--output_dir", folder)


def test_output_folder_below_a_file(given, tmp_path):
    (tmp_path / "file").touch()
    assert "--output_dir: cannot write" in refused(*given, "--output_dir", tmp_path / "file" / "out")


def test_lora_that_matches_nothing(given, tmp_path):
    import torch

    path = tmp_path / "other.safetensors"
    save_file({"lora_unet_down_blocks_0_x.lora_down.weight": torch.zeros(4, 4)}, path)
    assert "other.safetensors" in refused(*given, "--network_weights", path)


def test_state_of_another_run(given, tmp_path):
    first = run_in_process("flux_train_network.py", *given, "--save_state")
    assert first.returncode == 0, first.stderr[-2000:]
    other = ["--output_dir", tmp_path / "b", "--network_dim", "8", "--max_train_steps", "3"]
    result = run_in_process("flux_train_network.py", *given, *other, "--resume", tmp_path / "out" / "last-state")
    assert result.returncode == 2 and "belongs to another run" in result.stderr
    assert list((tmp_path / "b").iterdir()) == []


def test_a_process_says_nothing_but_the_sentence(given):
    result = launch("flux_train_network.py", *given, "--network_dim", "many", accelerate=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: --network_dim must be a whole number, not 'many'.\n"

"""hunyuan_image_train_network.py: what only this family does, through the command line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from hunyuan_image_train_network import HunyuanImageNetworkTrainer
from library.errors import UserError
from tests.families.hunyuan_image import hunyuan_image_options
from tests.running import make_trainer, run_in_process, toml_value

Train = Callable[..., str]


@pytest.fixture(scope="module")
def images(image_folder, tmp_path_factory) -> Path:
    """Four images, two of which quote a text; captions differ in length."""
    folder = tmp_path_factory.mktemp("hunyuan_images")
    captions = ('a sign "OPEN"', "a cat", "two dogs in the rain, it's night", "a poster ‘come in’ and “out”")
    for number, caption in enumerate(captions):
        shutil.copy(image_folder / f"{number:02d}.png", folder)
        (folder / f"{number:02d}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def train(tiny_hunyuan_image, images) -> Train:
    """Run the script into a folder, with --text_encoder and --byt5 among its options; returns what it said."""
    dataset = images.parent / "hunyuan.toml"
    dataset.write_text(
        "[[datasets]]\nresolution = 128\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 128\n"
        f"max_bucket_reso = 128\n[[datasets.subsets]]\nimage_dir = {toml_value(images.as_posix())}\n"
        'caption_extension = ".txt"\n',
        encoding="utf-8",
    )

    def run(folder: Path, *arguments: object) -> str:
        done = run_in_process(
            "hunyuan_image_train_network.py",
            *(*hunyuan_image_options(tiny_hunyuan_image), "--dataset_config", dataset, "--output_dir", folder),
            *("--max_data_loader_n_workers", "0", "--max_train_steps", "2", "--output_name", "lora", "--no_report"),
            *("--optimizer_type", "SGD", *arguments),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora.safetensors")


def differences(one: Path, two: Path) -> float:
    """The largest difference between two LoRA files."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory) -> Path:
    """The folder of the run that others are compared with."""
    folder = tmp_path_factory.mktemp("plain")
    train(folder)
    return folder


@pytest.mark.parametrize(
    "option",
    [
        "--text_encoder_cpu",
        "--vae_chunk_size 4",
        "--split_attn",
        pytest.param("--split_attn --sdpa", marks=pytest.mark.thorough),
    ],
)
def test_how_it_is_computed_changes_nothing(train, plain, tmp_path, option):
    train(tmp_path, *option.split())
    assert differences(tmp_path, plain) < 1e-6
    assert any(tensor.any() for key, tensor in weights(plain).items() if "lora_up" in key)


def test_fp8_vl_rounds_what_the_captions_say(train, tmp_path):
    train(tmp_path / "plain", "--mixed_precision", "bf16")
    train(tmp_path / "fp8", "--mixed_precision", "bf16", "--fp8_vl")
    changed = differences(tmp_path / "plain", tmp_path / "fp8")
    assert 0 < changed < 0.2 * max(tensor.abs().max().item() for tensor in weights(tmp_path / "plain").values())


def test_text_entries_are_as_long_as_their_captions_and_hold_quoted_texts(train, plain, images, tmp_path):
    given = ["--cache_text_encoder_outputs_to_disk", "--text_encoder_batch_size", "3"]
    assert re.search(r"text encoder cache: 0 kept, 4 made", train(tmp_path / "1", *given))
    assert differences(tmp_path / "1", plain) < 1e-6
    quoting, lengths = [], []
    for path in sorted(images.glob("*_hi_te.npz")):
        with numpy.load(path) as arrays:
            length = len(arrays["vlm_mask"])
            assert arrays["vlm_mask"].all() and arrays["vlm_embed"].shape[0] == length
            assert arrays["byt5_embed"].shape[0] == len(arrays["byt5_mask"]) == 128
            assert bool(arrays["ocr_mask"]) == bool(arrays["byt5_mask"].any()) == bool(arrays["byt5_embed"].any())
            quoting.append(bool(arrays["ocr_mask"]))
            lengths.append(length)
    assert quoting == [True, False, False, True] and len(set(lengths)) > 1
    assert re.search(r"text encoder cache: 4 kept, 0 made", train(tmp_path / "2", *given))
    assert differences(tmp_path / "1", tmp_path / "2") == 0


def test_a_quoted_text_acts_through_the_glyphs(tiny_hunyuan_image):
    from library.models.hunyuan_image.pipeline import HunyuanImageFiles, HunyuanImagePipeline

    tiny = tiny_hunyuan_image
    files = HunyuanImageFiles(tiny.transformer, tiny.text_encoder, tiny.byt5, tiny.autoencoder)
    pipeline = HunyuanImagePipeline(files, torch.float32, "cpu")
    with torch.no_grad():
        open_, shut = (pipeline.encode_prompts([f'a sign "{word}"']) for word in ("OPEN", "SHUT"))
        latents = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(1))
        sigmas = torch.tensor([0.5])
        mixed = open_ | {name: shut[name] for name in ("byt5_embed", "byt5_mask", "ocr_mask")}
        one, other = (pipeline.predict(latents, sigmas, text) for text in (open_, mixed))
    assert (one - other).abs().max() > 1e-4 * one.abs().max()


def test_the_samples_of_a_session_need_no_seed_and_any_size_is_rounded(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        'a sign "OPEN" --w 100 --h 64 --s 2 --fs 4\na cat --w 64 --h 96 --s 2 --l 1 --d 5\n', encoding="utf-8"
    )
    said = train(tmp_path, "--sample_prompts", prompts, "--sample_every_n_steps", "2")
    assert "prompt 1: 100x64 is rounded to 96x64, multiples of 32 pixels" in said
    assert len(list((tmp_path / "sample").glob("*.png"))) == 2


@pytest.mark.parametrize("others", ["", "--mixed_precision bf16"])
@pytest.mark.parametrize("option", ["--fp8_base", "--fp8_base_unet"])
def test_other_8_bit_floats_are_refused_with_all_that_is_needed_instead(tiny_hunyuan_image, option, others):
    words = (*hunyuan_image_options(tiny_hunyuan_image), option, *others.split())
    refusal = f"^{option} is not supported for HunyuanImage-2.1; use --fp8_scaled with --mixed_precision bf16 or fp16"
    with pytest.raises(UserError, match=refusal):
        make_trainer(HunyuanImageNetworkTrainer, *words).check_options()

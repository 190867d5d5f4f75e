"""A training run with nothing real in it: random tiny models, noisy images with captions, and its command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.families import FLUX, STABLE_DIFFUSION

if TYPE_CHECKING:
    from tools.make_tiny_models import TinyFlux

TEXT_TOKENS = 32


def make_images(folder: Path, count: int, size: int) -> Path:
    """``count`` PNG images of ``size`` x ``size`` pixels, as hard to decode as photographs, and their captions."""
    import numpy
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    draw = numpy.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (max(size // 16, 2),) * 2 + (3,), dtype=numpy.uint8))
        smooth = numpy.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=numpy.int16)
        grain = draw.integers(-8, 9, smooth.shape, dtype=numpy.int16)
        image = Image.fromarray((smooth + grain).clip(0, 255).astype(numpy.uint8))
        image.save(folder / f"{number:04d}.png", compress_level=6)
        (folder / f"{number:04d}.txt").write_text(f"a blue cat, number {number}, on a background", encoding="utf-8")
    return folder


def write_dataset(path: Path, images: Path, size: int, batch_size: int, repeats: int = 1) -> Path:
    """A dataset description over the images, at their own size."""
    path.write_text(
        f"[general]\nresolution = {size}\nbatch_size = {batch_size}\n"
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\n"
        f"caption_extension = '.txt'\nnum_repeats = {repeats}\n",
        encoding="utf-8",
    )
    return path


CACHED = "cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk network_train_unet_only"


def training_options(
    models: TinyFlux, dataset: Path, output: Path, steps: int, more: Mapping[str, object] | None = None
) -> list[str]:
    """The command line of a LoRA training whose latents and text encoder outputs come from cache files.

    ``more`` names further options with their values.
    """
    options = {
        "pretrained_model_name_or_path": models.transformer,
        "clip_l": models.clip_l,
        "t5xxl": models.t5xxl,
        "ae": models.autoencoder,
        "network_module": FLUX.networks[0],
        "timestep_sampling": "flux_shift",
        "model_prediction_type": "raw",
        "guidance_scale": 1.0,
        "t5xxl_max_token_length": TEXT_TOKENS,
        **(more or {}),
    }
    return _command_line(options, dataset, output, steps)


def stable_diffusion_training_options(
    model: Path, dataset: Path, output: Path, steps: int, more: Mapping[str, object] | None = None
) -> list[str]:
    """The same for a Stable Diffusion model in a single file."""
    options = {"pretrained_model_name_or_path": model, "network_module": STABLE_DIFFUSION.networks[0], **(more or {})}
    return _command_line(options, dataset, output, steps)


def _command_line(special: Mapping[str, object], dataset: Path, output: Path, steps: int) -> list[str]:
    options = {
        "dataset_config": dataset,
        "output_dir": output,
        "output_name": "lora",
        "network_dim": 4,
        "learning_rate": 1e-3,
        "seed": 7,
        "max_train_steps": steps,
        **special,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return words + [f"--{name}" for name in CACHED.split()]

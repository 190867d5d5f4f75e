"""What the tiny models of Stable Diffusion's families share; those with few blocks make many runs take little time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.families.family import Family, small_lora

if TYPE_CHECKING:
    from library.models.stable_diffusion.checkpoint import Variant
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline
    from tools.make_tiny_stable_diffusion import Layout, Shape


def few_blocks(variant: Variant) -> Shape:
    """The shape of a tiny model with two of the real model's levels.

    Tests of the blocks themselves use the models of ``tools/make_tiny_stable_diffusion.py``, which have all of them.
    """
    from tools.make_tiny_stable_diffusion import SHAPES

    full = SHAPES[variant]
    return replace(
        full,
        widths=full.widths[:2],
        depths=(0, 1) if variant == "sdxl" else (1, 1),
        heads=full.heads if isinstance(full.heads, int) else full.heads[:2],
        encoders=tuple(replace(encoder, layers=2) for encoder in full.encoders),
        resnets=2 if variant == "sdxl" else 1,  # XL is recognised by its input block 4
        autoencoder_widths=(8, 16, 16, 16),
        autoencoder_resnets=1,
    )


def make_few_blocks(folder: Path, variant: Variant, layout: Layout = "original", **more: Any) -> Path:
    """A random tiny model of few blocks in one of the real models' layouts; returns what names it to the scripts.

    ``more`` are further arguments of ``make_tiny_stable_diffusion``.
    """
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    return make_tiny_stable_diffusion(folder, variant, layout, shape=few_blocks(variant), **more)


def make_tiny(variant: Variant, folder: Path) -> Path:
    """The single file of a random tiny model under the real file's key names, with its tokenizers beside it."""
    from tools.make_tiny_stable_diffusion import make_tiny_stable_diffusion

    return make_tiny_stable_diffusion(folder, variant)


def loaded_pipelines(models: Mapping[str, Path]) -> Callable[[str], StableDiffusionPipeline]:
    """Gives the pipeline of a variant with its U-Net and text encoders loaded, each made once."""
    import torch

    from library.models.stable_diffusion.pipeline import StableDiffusionFiles, StableDiffusionPipeline

    @cache
    def load(variant: str) -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline(StableDiffusionFiles(models[variant]), torch.float32, "cpu")
        for part in ("unet", *pipeline.encoders):
            pipeline.load(part)
        return pipeline

    return load


def stable_diffusion(variant: Variant, caches: tuple[str, str], planned: str, *options: object) -> Family:
    """A family whose models are one file; ``options`` are what its command line needs beside."""

    def command(files: Any) -> list[object]:
        return ["--pretrained_model_name_or_path", files, *small_lora("networks.lora"), *options]

    shared = [option for option in options if option == "--v_parameterization"]
    return Family(
        name=variant,
        make=partial(make_tiny, variant),
        command=command,
        idle="--ddp_static_graph",
        caches=caches,
        planned=planned,
        drawing=lambda files: ["--ckpt", files, "--sequential_file_name", *shared],
        dtypes={"fp32": (), "bf16": ("--bf16",)},
        lora_option=("--network_module", "networks.lora", "--network_weights"),
        output_option="--outdir",
        guidance="--l",
    )

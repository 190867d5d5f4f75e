"""img2img and inpainting of ``gen_img.py``: which images are drawn over, and where."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from library.console import say, warn
from library.errors import UserError
from library.generation.features import Batch, Feature, value_or
from library.generation.image_files import CONTACT_SHEET
from library.generation.image_prompts import ImagePrompt
from library.generation.prompt_sources import PromptLine
from library.generation.recorded_prompts import recorded_lines
from library.generation.sampling_options import SamplingOptions
from library.image_reading import open_image, read_given_image
from library.options import Aliases

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.models.sampling import StepHook

DEFAULT_STRENGTH = 0.8
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Of the images that are taken from a folder."""
MULTIPLE = 32
"""Pixels that both sides of an image that is drawn over are rounded down to a multiple of."""
SMALLEST_SIDE = 64
LATENTS_KEPT = 64
SIZE_OPTION = re.compile(r" --[wh] ", re.IGNORECASE)


@dataclass
class StartImageOptions:
    """Image to image"""

    image_path: str | None = None
    """An image that is drawn over (img2img), or a folder of them, which are taken in order."""
    mask_path: Annotated[str | None, Aliases("mask_image")] = None
    """What is drawn over: white parts of this image, or of a folder's. For a prompt with " AND ", and for networks
    without --image_path, it shows the regions of the prompt's parts and of the networks instead."""
    strength: float | None = None
    """How much of an image is changed, from 0 (nothing) to 1; unset means 0.8."""


def open_start_images(
    options: StartImageOptions, sampling: SamplingOptions, images_per_prompt: int = 1, regional: bool = False
) -> StartImages | None:
    """The images of the options; None without any. ``regional``: there are networks that can act in regions.

    Raises UserError for files that are missing or no images, and for a strength outside 0..1.
    """
    strength = options.strength
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"--strength must be between 0 and 1, not {strength:g}.")
    if options.image_path is None and options.mask_path is None:
        return None
    size = None if sampling.W is None or sampling.H is None else (sampling.W, sampling.H)
    if options.image_path is not None and (sampling.pyramid_noise_prob or sampling.noise_offset_prob):
        say("--pyramid_noise_prob and --noise_offset_prob have no effect with --image_path")
    return StartImages(
        files=list_images(options.image_path, "--image_path"),
        masks=list_images(options.mask_path, "--mask_path"),
        size=size,
        images_per_prompt=images_per_prompt,
        regional=regional,
    )


def list_images(path: str | None, option: str) -> list[Path]:
    """A file, or the images of a folder by name; none for None. Raises UserError where there are none or one is broken.

    Names are ordered as text: "10.png" comes before "2.png". Contact sheets (``--grid``) of a folder are left out.
    """
    if path is None:
        return []
    place = Path(path)
    if place.is_dir():
        found = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        files = [file for file in found if not _is_contact_sheet(file, option)]
    else:
        files = [place] if place.is_file() else []
    if not files:
        what = f"holds no image ({', '.join(SUFFIXES)})" if place.is_dir() else "is neither a file nor a folder"
        raise UserError(f"{option}: {path} {what}.")
    for file in files:
        _opened(file, option).close()
    return files


def _is_contact_sheet(file: Path, option: str) -> bool:
    with _opened(file, option) as image:
        return CONTACT_SHEET in image.info


def read_grey_image(file: Path, option: str) -> Image:
    """An image's brightness, in grey. Raises UserError, beginning with ``option``."""
    return read_given_image(file, option).convert("L")


def _opened(file: Path, option: str) -> Image:
    """An image whose header has been read. Raises UserError, beginning with ``option``, for what is none."""
    try:
        return open_image(file)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


class StartImages(Feature):
    """The images that are drawn over, with masks; an image's running number chooses its file, time and again."""

    option = "--image_path"

    def __init__(
        self,
        files: list[Path],
        masks: list[Path],
        size: tuple[int, int] | None,
        images_per_prompt: int,
        regional: bool,
    ):
        self.files = files
        self.masks = masks
        self.size = size
        """Width and height that every image is given; None: its own."""
        self.images_per_prompt = images_per_prompt
        self.repeats = 1
        """Images drawn over each file before the next one's turn."""
        self.regional = regional
        self.latents: dict[tuple[Path, int, int], Tensor] = {}
        self.said: set[Path] = set()
        self.warned = False

    # ---- files ------------------------------------------------------------------------------------------------------

    def file(self, number: int) -> Path:
        """What the image with this running number is drawn over."""
        return self.files[number // self.repeats % len(self.files)]

    def image(self, number: int) -> Image:
        """The same as RGB."""
        return read_given_image(self.file(number), self.option)

    def mask(self, number: int) -> Image:
        """The mask, in grey."""
        return read_grey_image(self.masks[number // self.repeats % len(self.masks)], "--mask_path")

    def recorded_lines(self) -> list[PromptLine]:
        """The prompt in the text of each file, with its negative prompt; each is then drawn --images_per_prompt times.

        Raises UserError for a file without one.
        """
        lines = recorded_lines(self.files)
        self.repeats = self.images_per_prompt
        return lines

    # ---- what is drawn ----------------------------------------------------------------------------------------------

    def sized(self, prompt: ImagePrompt) -> ImagePrompt:
        """``prompt`` with the size of its start image, multiples of 32, instead of its own."""
        if not self.files:
            return prompt
        file = self.file(prompt.number)
        given = self.size
        if given is None:
            with _opened(file, self.option) as image:
                given = image.size
        width, height = (floored(side) for side in given)
        if (width, height) != given and file not in self.said:
            self.said.add(file)
            warn(f"{file}: {given[0]}x{given[1]} is rounded to {width}x{height}.")
        if self.size is None and SIZE_OPTION.search(prompt.raw_prompt or "") and not self.warned:
            self.warned = True
            warn("--w and --h have no effect on an image that is drawn over; give --W and --H to stretch it.")
        return dataclasses.replace(prompt, width=width, height=height)

    def masks_regions(self, prompt: ImagePrompt) -> bool:
        """Whether the mask is one of regions and not of what is repainted."""
        return bool(self.masks) and (" AND " in prompt.prompt or (self.regional and not self.files))

    def check(self, prompt: ImagePrompt, place: str) -> None:
        """Raises UserError, beginning with ``place``, for a mask that has nothing to act on."""
        if not self.files and not self.masks_regions(prompt):
            raise UserError(
                f"{place}--mask_path needs --image_path, whose white parts are repainted; or networks, or a "
                'prompt with " AND ", whose regions it shows.'
            )

    def encode(self, batch: Batch, pipeline: Any) -> None:
        """Give each request of ``batch`` the latents of its image; the autoencoder is at work."""
        if not self.files or batch.stage == 2:
            return
        for prompt, request, number in zip(batch.prompts, batch.requests, batch.numbers):
            key = (self.file(number), batch.width, batch.height)
            if key not in self.latents:
                self.latents[key] = encoded_image(pipeline, self.image(number), batch.width, batch.height)
                while len(self.latents) > LATENTS_KEPT:
                    del self.latents[next(iter(self.latents))]
            request.start_latents = self.latents[key]
            request.strength = value_or(prompt.strength, DEFAULT_STRENGTH)

    def hook(self, batch: Batch) -> StepHook | None:
        """With masks, what keeps the rest of the image."""
        if not self.masks or not self.files or batch.stage == 2 or self.masks_regions(batch.prompts[0]):
            return None
        from library.models.inpainting import Inpainting

        return Inpainting(mask_tensor([self.mask(number) for number in batch.numbers], batch.width, batch.height))

    def settings(self, prompt: ImagePrompt) -> Mapping[str, str]:
        """The image's file name and the strength."""
        if not self.files:
            return {}
        strength = value_or(prompt.strength, DEFAULT_STRENGTH)
        masked = bool(self.masks) and not self.masks_regions(prompt)
        mask = {"mask-image": self.masks[prompt.number // self.repeats % len(self.masks)].name} if masked else {}
        return {"start-image": self.file(prompt.number).name, "strength": f"{strength:g}", **mask}


def floored(side: float) -> int:
    """A side in pixels as a multiple of 32, rounded down, at least 64."""
    return max(int(side) // MULTIPLE * MULTIPLE, SMALLEST_SIDE)


def encoded_image(pipeline: Any, image: Image, width: int, height: int) -> Tensor:
    """Latents [4, height / 8, width / 8], scaled, on the CPU, of an image that is stretched to that size."""
    from library.models.pipeline import from_image

    latents = pipeline.encode_images(from_image(image, width, height)[None], None)
    return (latents[0] * pipeline.latent_scale).cpu()


def mask_tensor(masks: list[Image], width: int, height: int) -> Tensor:
    """[B, 1, height / 8, width / 8], 1 where an image is repainted, of grey images."""
    import numpy
    import torch
    from PIL import Image

    size = (width // 8, height // 8)
    grey = [numpy.array(mask.resize(size, Image.Resampling.BILINEAR), dtype=numpy.float32) for mask in masks]
    return torch.from_numpy(numpy.stack(grey))[:, None] / 255

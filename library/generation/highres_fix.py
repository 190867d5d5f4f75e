"""Highres. fix of ``gen_img.py``: a small image is generated first, then a large one over it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.console import say
from library.errors import UserError, in_one_line
from library.generation.features import value_or
from library.generation.image_prompts import ImagePrompt
from library.generation.start_images import DEFAULT_STRENGTH, encoded_image, floored

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SCALED = (
    *("original_height", "original_width", "original_height_negative", "original_width_negative"),
    *("crop_top", "crop_left"),
)
"""SDXL's size conditioning; the first image's is divided by the same scale."""
FUNCTION = "create_upscaler"


@dataclass
class HighresOptions:
    """Highres. fix"""

    highres_fix_scale: float | None = None
    """Draw an image of this share of width and height first, then the whole size over it; 0.5 is usual."""
    highres_fix_steps: int = 28
    """Steps of the first, smaller image."""
    highres_fix_strength: float | None = None
    """Strength of the first image with --image_path; unset means --strength, which is the second image's."""
    highres_fix_save_1st: bool = False
    """Keep the first images, too."""
    highres_fix_latents_upscaling: bool = False
    """Enlarge the first image's latents and not the image itself."""
    highres_fix_upscaler: str | None = None
    """Python module that enlarges the first image, such as tools.latent_upscaler."""
    highres_fix_upscaler_args: str | None = None
    """Arguments of the module: "key=value;key=value"."""
    highres_fix_disable_control_net: bool = False
    """ControlNet acts on the first image only."""


def open_highres(options: HighresOptions, pipeline: Any) -> HighresFix | None:
    """Highres. fix as the options say, with its upscaler; None without --highres_fix_scale.

    Raises UserError for numbers that cannot be and for an upscaler that cannot be used.
    """
    if options.highres_fix_scale is None:
        unused = [
            field.name
            for field in dataclasses.fields(options)
            if getattr(options, field.name) != getattr(HighresOptions(), field.name)
        ]
        if unused:
            say(f"no effect without --highres_fix_scale: {', '.join(f'--{name}' for name in unused)}")
        return None
    if not 0 < options.highres_fix_scale <= 1:
        raise UserError(f"--highres_fix_scale must be above 0 and at most 1, not {options.highres_fix_scale:g}.")
    if not 1 <= options.highres_fix_steps <= 1000:
        raise UserError(f"--highres_fix_steps must be from 1 to 1000, not {options.highres_fix_steps}.")
    strength = options.highres_fix_strength
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"--highres_fix_strength must be between 0 and 1, not {strength:g}.")
    if options.highres_fix_upscaler is None and options.highres_fix_upscaler_args is not None:
        say("--highres_fix_upscaler_args has no effect without --highres_fix_upscaler")
    if options.highres_fix_upscaler is not None and options.highres_fix_latents_upscaling:
        say("--highres_fix_latents_upscaling has no effect with --highres_fix_upscaler")
    return HighresFix(options, pipeline)


class HighresFix:
    """Two stages for each image, and what happens between them."""

    def __init__(self, options: HighresOptions, pipeline: Any):
        self.options = options
        self.pipeline = pipeline
        self.scale = options.highres_fix_scale or 1.0
        self.upscaler: Any = None
        if options.highres_fix_upscaler is not None:
            self.upscaler = create_upscaler(options.highres_fix_upscaler, options.highres_fix_upscaler_args)

    def first(self, prompt: ImagePrompt) -> ImagePrompt:
        """The small image: its sizes are multiples of 32, its steps and strength the first stage's."""
        options = self.options
        told = {name: getattr(prompt, name) for name in SCALED}
        scaled: dict[str, Any] = {name: self._scaled(side) for name, side in told.items() if side is not None}
        return dataclasses.replace(
            prompt,
            width=floored(self._scaled(prompt.width)),
            height=floored(self._scaled(prompt.height)),
            sample_steps=options.highres_fix_steps,
            strength=value_or(options.highres_fix_strength, prompt.strength),
            **scaled,
        )

    def second(self, prompt: ImagePrompt) -> ImagePrompt:
        """The large image over it, from the next seed."""
        seed = prompt.seed
        if seed is not None:
            seed = seed + 1 if seed < 2**64 - 1 else 0
        return dataclasses.replace(prompt, seed=seed, strength=value_or(prompt.strength, DEFAULT_STRENGTH))

    def settings(self, prompt: ImagePrompt) -> dict[str, str]:
        """What the text in an image's file says of it, by key."""
        options, how = self.options, "latents" if self.takes_latents else "image"
        numbers = f"{self.scale:g},{options.highres_fix_steps},{self.second(prompt).strength:g}"
        return {"highres-fix": f"{numbers},{options.highres_fix_upscaler or how}"}

    def _scaled(self, side: int | None) -> int:
        return int((side or 0) * self.scale + 0.5)

    @property
    def takes_latents(self) -> bool:
        """Whether the large image comes from the small one's latents, so that nothing needs to be decoded."""
        if self.upscaler is not None:
            return bool(self.upscaler.support_latents())
        return self.options.highres_fix_latents_upscaling

    def enlarged(
        self,
        latents: Tensor | None,
        images: Sequence[Image] | None,
        width: int,
        height: int,
    ) -> list[Tensor]:
        """What the large images begin with, latents [4, height / 8, width / 8] each.

        Of small ``latents`` [B, 4, h, w] or ``images``, whichever ``takes_latents`` asks for; the autoencoder is at
        work. Raises UserError for an upscaler that gives something else.
        """
        if self.upscaler is not None:
            return self._by_upscaler(latents, images, width, height)
        if self.takes_latents:
            assert latents is not None
            return list(resized_latents(latents, height, width))
        return [encoded_image(self.pipeline, image, width, height) for image in images or ()]

    def _by_upscaler(self, latents: Any, images: Sequence[Image] | None, width: int, height: int) -> list[Tensor]:
        import torch

        vae = self.pipeline.load_autoencoder()
        dtype = next(vae.parameters()).dtype
        upscaler = self.upscaler.to(dtype).to(self.pipeline.device)
        count = len(latents) if images is None else len(images)
        at_once = self.pipeline.images_at_once(count)
        made = upscaler.upscale(vae, images, latents, dtype, width, height, count, at_once)
        if not isinstance(made, torch.Tensor):
            return [encoded_image(self.pipeline, image, width, height) for image in made]
        shape = (count, self.pipeline.latent_channels, height // 8, width // 8)
        if made.shape != shape:
            raise UserError(
                f"--highres_fix_upscaler {self.options.highres_fix_upscaler}: gave latents {list(made.shape)}, not "
                f"{list(shape)}."
            )
        return list(made.float())


def resized_latents(latents: Tensor, height: int, width: int) -> Tensor:
    """[B, 4, h, w] to [B, 4, height / 8, width / 8], bicubic."""
    import torch

    size = (height // 8, width // 8)
    return torch.nn.functional.interpolate(latents.float(), size=size, mode="bicubic", align_corners=False)


def create_upscaler(module: str, arguments: str | None) -> Any:
    """The upscaler of a module: its ``create_upscaler`` with the arguments "key=value;key=value" as text.

    It has ``to``, ``support_latents() -> bool`` and ``upscale(vae, images, latents, dtype, width, height, batch_size,
    vae_batch_size)``, which gives PIL images or scaled latents. Raises UserError where any of this is not so.
    """
    place = f"--highres_fix_upscaler {module}"
    try:
        create = getattr(importlib.import_module(module), FUNCTION, None)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place} cannot be imported ({in_one_line(error)}).") from error
    if not callable(create):
        raise UserError(f"{place}: the module has no function {FUNCTION}.")
    given: dict[str, str] = {}
    for part in filter(None, (arguments or "").split(";")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise UserError(f'--highres_fix_upscaler_args must be "key=value;key=value", not "{arguments}".')
        given[name.strip()] = value.strip()
    try:
        inspect.signature(create).bind(**given)
    except TypeError as error:
        raise UserError(f"--highres_fix_upscaler_args don't fit {module} ({error}).") from None
    return create(**given)

"""Guidance of ``gen_img.py`` by what CLIP and VGG16 see in the image: its options, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from library.errors import UserError
from library.generation.guide_images import OPTION as GUIDE_OPTION
from library.generation.guide_images import GuideImages
from library.options import Aliases

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.generation.features import Feature

CLIP_HUB_ID = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
CLIP_VISION_HUB_ID = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
LAST_LAYER = 30
"""Of the layers of VGG16 that work on images, counted from 0."""


@dataclass
class GuidanceOptions:
    """Guidance by CLIP and VGG16"""

    clip_guidance_scale: float = 0.0
    """How strongly the image is led towards what CLIP makes of the prompt, or of the prompt's --c; 100 is usual, and 0
    turns it off. For the samplers ddim, pndm and lms."""
    clip_image_guidance_scale: float = 0.0
    """The same towards an image of --guide_image_path, or without one, towards the image that was generated last."""
    vgg16_guidance_scale: float = 0.0
    """The same towards an image of --guide_image_path as VGG16 sees it, with --vgg16_weights."""
    vgg16_guidance_layer: Annotated[int, Aliases("vgg16_guidance_layerP")] = 20
    """The layer of VGG16 whose outputs are compared, 0 to 30; low ones are about content, high ones about style."""
    clip_vision_strength: float | None = None
    """SDXL with --image_path: in the place of the pooled text, what CLIP sees in the start image, times this."""
    clip_model: str = CLIP_HUB_ID
    """Folder of the CLIP for the first two, or its id on the Hugging Face hub, from where it is fetched once."""
    vgg16_weights: str | None = None
    """File of torchvision's VGG16 weights (vgg16-397923af.pth); unset means the one in torch's own cache."""
    clip_vision_model: str = CLIP_VISION_HUB_ID
    """Folder of the CLIP vision model for --clip_vision_strength, or its id on the Hugging Face hub."""


def open_guidance(options: GuidanceOptions, guide_paths: list[str], pipeline: Any) -> list[Feature]:
    """The features that the options ask for, with the files of ``--guide_image_path``.

    Raises UserError, before anything is loaded, for options and files that cannot be used.
    """
    for name in ("clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} must not be negative, but is {getattr(options, name):g}.")
    features: list[Feature] = []
    by_image = options.clip_image_guidance_scale or options.vgg16_guidance_scale
    guides = GuideImages(guide_paths if by_image else [])
    if options.clip_guidance_scale or options.clip_image_guidance_scale:
        from library.generation.clip_guidance import Clip, ClipImageGuide, ClipTextGuide

        clip = Clip(options.clip_model, pipeline)
        if options.clip_guidance_scale:
            features.append(ClipTextGuide(pipeline, options.clip_guidance_scale, clip))
        if options.clip_image_guidance_scale:
            features.append(ClipImageGuide(pipeline, options.clip_image_guidance_scale, clip, guides))
    if options.vgg16_guidance_scale:
        from library.generation.vgg_guidance import Vgg16, Vgg16Guide

        if not len(guides):
            raise UserError(f"--vgg16_guidance_scale needs an image to aim at: name it with {GUIDE_OPTION}.")
        if not 0 <= options.vgg16_guidance_layer <= LAST_LAYER:
            raise UserError(
                f"--vgg16_guidance_layer must be between 0 and {LAST_LAYER}, not {options.vgg16_guidance_layer}."
            )
        vgg = Vgg16(vgg16_file(options.vgg16_weights), options.vgg16_guidance_layer)
        features.append(Vgg16Guide(pipeline, options.vgg16_guidance_scale, vgg, guides))
    return features


def vgg16_file(named: str | None) -> Path:
    """The file of VGG16's weights. Raises UserError where none is named and torch's cache has none either."""
    if named is not None:
        return Path(named)
    import torch

    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_URL.rpartition("/")[2]
    if not cached.is_file():
        raise UserError(
            f"--vgg16_guidance_scale needs VGG16's weights, which are not downloaded: get {VGG16_URL} and name the "
            "file with --vgg16_weights."
        )
    return cached


def open_clip_vision(
    options: GuidanceOptions, pipeline: Any, start_image: Callable[[int], Image] | None
) -> Feature | None:
    """CLIP vision conditioning, or None where it isn't requested.

    ``start_image`` gives the RGB start image for the drawn image of a number; None where nothing is drawn over. Raises
    UserError for another model than XL, without a start image, and for a CLIP that doesn't fit.
    """
    if options.clip_vision_strength is None:
        return None
    if pipeline.variant != "sdxl":
        raise UserError("--clip_vision_strength is for Stable Diffusion XL only.")
    if start_image is None:
        raise UserError("--clip_vision_strength needs start images: name them with --image_path.")
    from library.generation.clip_vision import ClipVision

    return ClipVision(pipeline, options.clip_vision_model, options.clip_vision_strength, start_image)

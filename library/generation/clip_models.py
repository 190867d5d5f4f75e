"""CLIP models that see images: read from a folder or the Hugging Face hub, and how images are prepared for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.console import say
from library.errors import UserError, in_one_line
from library.generation.features import weight_bytes
from library.lean_imports import transformers_class
from library.models.loading import on_meta
from library.safetensors_io import json_object
from library.text_files import read_text

if TYPE_CHECKING:
    from PIL.Image import Image

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours in 0..1 that CLIP was trained with."""


class ClipModel:
    """A model of transformers' CLIP that is loaded when it is needed.

    Raises UserError, naming ``option``, for a folder that holds another kind of model and for a name that is neither a
    folder nor an id on the hub.
    """

    def __init__(self, class_name: str, name: str, option: str):
        self.class_name, self.name, self.option = class_name, name, option
        self.module: Any = None
        self.config = _config(name, class_name, option)
        """What the folder's config.json says; {} for a model on the hub."""

    @property
    def loaded(self) -> list[nn.Module]:
        """The module, once it is loaded."""
        return [] if self.module is None else [self.module]

    def model_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """The memory of its weights, by its name; 0 for a model on the hub, of which nothing is known yet."""
        if not self.config:
            return {self.name: 0}
        model_class = transformers_class("clip.modeling_clip", self.class_name)
        with on_meta():
            module = model_class(model_class.config_class.from_pretrained(self.name))
        return {self.name: weight_bytes(module, dtype)}

    def load(self, dtype: torch.dtype, device: torch.device | str) -> Any:
        """The module, frozen. A model on the hub is announced. Raises UserError where it cannot be read."""
        if self.module is None:
            if not self.config:
                say(f"{self.option}: {self.name} comes from the Hugging Face hub, where it isn't in the cache yet.")
            model_class = transformers_class("clip.modeling_clip", self.class_name)
            try:
                module = model_class.from_pretrained(self.name, dtype=dtype)
            except Exception as error:  # the hub's client and damaged files raise many kinds
                raise UserError(f"{self.option}: {self.name} cannot be read ({in_one_line(error)}).") from None
            self.module = module.to(device).requires_grad_(False).eval()
        return self.module


def _config(name: str, class_name: str, option: str) -> dict[str, Any]:
    folder = Path(name)
    if not folder.exists():
        if not HUB_ID.fullmatch(name):
            raise UserError(f"{option}: {name} does not exist.")
        return {}
    if not (folder / "config.json").is_file():
        raise UserError(f"{option}: {name} is not a folder with a model of transformers: it has no config.json.")
    config = json_object(read_text(folder / "config.json"))
    # A whole CLIP has a vision model in it too.
    if config.get("model_type") not in ({"clip"} if class_name == "CLIPModel" else {"clip", "clip_vision_model"}):
        raise UserError(
            f"{option}: {name} holds a model of the kind {config.get('model_type')}, where a CLIP is needed."
        )
    return config


def normalised(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in 0..1 as CLIP is given them."""
    mean, deviation = (images.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (images - mean) / deviation


def cropped(image: Image, side: int) -> Image:
    """The middle square of an image whose shorter side is made ``side`` long (bicubic), as CLIP's own preparation."""
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    size = (int(side * width / short), int(side * height / short))
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return resized.crop((left, top, left + side, top + side))

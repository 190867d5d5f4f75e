"""Guidance by VGG16 (Simonyan and Zisserman 2014): the image is led towards another one, layer outputs compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.generation.features import Batch, weight_bytes
from library.generation.guide_images import GuideImages, pixels
from library.generation.image_guidance import ImageGuide, Loss

OPTION = "--vgg16_weights"
CONVOLUTIONS_PER_SIZE = (2, 2, 3, 3, 3)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours in 0..1 that it was trained with."""


class Vgg16:
    """The layers of VGG16 up to one, from a file with torchvision's names, of which the headers are read at once.

    Raises UserError for a file without the weights of those layers.
    """

    def __init__(self, path: Path, layer: int):
        self.checkpoint = open_checkpoint(path, option=OPTION)
        self.layers: list[nn.Module] = []
        inputs = 3
        with torch.device("meta"):
            for kind in _kinds()[: layer + 1]:
                if kind is nn.Conv2d:
                    outputs = self._outputs(len(self.layers), inputs)
                    self.layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
                    inputs = outputs
                else:
                    self.layers.append(nn.ReLU() if kind is nn.ReLU else nn.MaxPool2d(2))
        self.module: nn.Module | None = None

    def _outputs(self, index: int, inputs: int) -> int:
        key = f"features.{index}.weight"
        shape = self.checkpoint.shape(key) if key in self.checkpoint else ()
        if len(shape) != 4 or shape[1:] != (inputs, 3, 3) or f"features.{index}.bias" not in self.checkpoint:
            raise UserError(f'{self.checkpoint.label} does not hold VGG16: "{key}" is missing or of another shape.')
        return shape[0]

    @property
    def loaded(self) -> list[nn.Module]:
        """The layers as one module, once they are loaded."""
        return [] if self.module is None else [self.module]

    def model_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """The memory of their weights, by the file's name."""
        return {str(self.checkpoint.path): sum(weight_bytes(layer, dtype) for layer in self.layers)}

    def load(self, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """The layers, frozen: images [B, 3, H, W] in 0..1, normalised, to their outputs."""
        if self.module is None:
            module = nn.Sequential(*self.layers)
            state = {name: self.checkpoint.load(f"features.{name}", dtype, device) for name in module.state_dict()}
            module.load_state_dict(state, assign=True)
            self.module = module.requires_grad_(False).eval()
        return self.module


def _kinds() -> list[type[nn.Module]]:
    kinds: list[type[nn.Module]] = []
    for count in CONVOLUTIONS_PER_SIZE:
        kinds += [nn.Conv2d, nn.ReLU] * count + [nn.MaxPool2d]
    return kinds


class Vgg16Guide(ImageGuide):
    """``--vgg16_guidance_scale``"""

    option = "--vgg16_guidance_scale"

    def __init__(self, pipeline: Any, scale: float, vgg: Vgg16, guides: GuideImages):
        super().__init__(pipeline, scale, vgg)
        self.vgg = vgg
        self.guides = guides

    @torch.no_grad()
    def loss(self, batch: Batch) -> Loss | None:
        """The mean square of the differences of the outputs, for images of a quarter of the size."""
        from PIL import Image

        height, width = batch.height // 4, batch.width // 4
        images = [
            self.guides.image(number).resize((width, height), Image.Resampling.NEAREST) for number in batch.numbers
        ]
        aims = self.outputs(torch.stack([pixels(image) for image in images]).to(self.pipeline.device))

        def loss(images: Tensor) -> Tensor:
            small = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
            return (self.outputs(small) - aims).square().mean(dim=(1, 2, 3))

        return loss

    def outputs(self, images: Tensor) -> Tensor:
        """What the chosen layer gives [B, C, h, w], float32, of images in 0..1."""
        module = self.vgg.load(self.pipeline.dtype, self.pipeline.device)
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        return module(((images - mean) / deviation).to(self.pipeline.dtype)).float()

"""Guidance by CLIP: the image is led towards a text, or towards another image, as CLIP understands them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.generation.clip_models import ClipModel, normalised
from library.generation.features import Batch
from library.generation.guide_images import GuideImages, pixels
from library.generation.image_guidance import ImageGuide, Loss

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT_TOKENS = 77


class Clip:
    """The model of ``--clip_model``, and what it makes of texts and images: unit vectors [B, features]."""

    def __init__(self, name: str, pipeline: Any):
        self.pipeline = pipeline
        self.model = ClipModel("CLIPModel", name, "--clip_model")

    @property
    def module(self) -> Any:
        """The loaded model."""
        return self.model.load(self.pipeline.dtype, self.pipeline.device)

    @property
    def side(self) -> int:
        """Of the images that it is given, in pixels."""
        return self.module.config.vision_config.image_size

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Of the first tokens of each text, weights of words left out."""
        tokens = self.pipeline.first_tokens(texts)
        known = self.module.config.text_config.vocab_size
        features = self.module.get_text_features(tokens.clamp(max=known - 1).to(self.pipeline.device))
        return F.normalize(features.pooler_output.float(), dim=-1)

    def of_images(self, images: Tensor) -> Tensor:
        """Of images [B, 3, side, side] in 0..1; gradients flow."""
        features = self.module.get_image_features(normalised(images).to(self.pipeline.device, self.pipeline.dtype))
        return F.normalize(features.pooler_output.float(), dim=-1)

    def distances(self, aims: Tensor) -> Loss:
        """The spherical distance of images, stretched to a square, to ``aims`` [B, features]."""
        size = (self.side, self.side)

        def loss(images: Tensor) -> Tensor:
            seen = self.of_images(F.interpolate(images, size, mode="bilinear", antialias=True))
            return 2 * (seen - aims).norm(dim=-1).div(2).arcsin().square()

        return loss


class ClipTextGuide(ImageGuide):
    """``--clip_guidance_scale``"""

    option = "--clip_guidance_scale"

    def __init__(self, pipeline: Any, scale: float, clip: Clip):
        super().__init__(pipeline, scale, clip.model)
        self.clip = clip

    def loss(self, batch: Batch) -> Loss | None:
        """The distance to what each prompt, or its --c, says."""
        return self.clip.distances(
            self.clip.of_texts([prompt.clip_prompt or prompt.prompt for prompt in batch.prompts])
        )


class ClipImageGuide(ImageGuide):
    """``--clip_image_guidance_scale``; without guide images, the aim is the image that was generated last."""

    option = "--clip_image_guidance_scale"

    def __init__(self, pipeline: Any, scale: float, clip: Clip, guides: GuideImages):
        super().__init__(pipeline, scale, clip.model)
        self.clip = clip
        self.guides = guides
        self.last: Image | None = None

    def drawn(self, batch: Batch, images: Sequence[Image]) -> None:
        """Keeps the last image; that of a first stage is not finished."""
        if batch.stage != 1:
            self.last = images[-1]

    @torch.no_grad()
    def loss(self, batch: Batch) -> Loss | None:
        """The distance to the guide images; None for the first image where there are none."""
        if len(self.guides):
            aims = [self.guides.image(number) for number in batch.numbers]
        elif self.last is not None:
            aims = [self.last] * len(batch.numbers)
        else:
            return None
        from PIL import Image

        size = (self.clip.side, self.clip.side)
        small = [pixels(aim.resize(size, Image.Resampling.NEAREST)) for aim in aims]
        return self.clip.distances(self.clip.of_images(torch.stack(small)))

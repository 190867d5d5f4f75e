"""CLIP vision conditioning: SDXL's pooled text is replaced by what CLIP sees in the image that is drawn over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.generation.clip_models import ClipModel, cropped, normalised
from library.generation.features import Batch, Feature
from library.generation.guide_images import pixels
from library.models.sampling import ModelCall, RunModel, StepHook

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.generation.image_prompts import ImagePrompt

OPTION = "--clip_vision_model"
POOLED = "pool2"


class ClipVision(Feature):
    """``--clip_vision_strength``. In the second stage of Highres. fix, the images of the first one are looked at.

    Raises UserError for a model whose outputs don't have the size of the pooled text.
    """

    option = "--clip_vision_strength"

    def __init__(self, pipeline: Any, model: str, strength: float, start_image: Callable[[int], Image]):
        self.pipeline = pipeline
        self.strength = strength
        self.start_image = start_image
        self.model = ClipModel("CLIPVisionModelWithProjection", model, OPTION)
        size, needed = self.model.config.get("projection_dim"), pipeline.opened("text_encoder_2").projection_size
        if size is not None and size != needed:
            raise UserError(f"{OPTION}: {model} gives {size} values of an image, where the pooled text has {needed}.")
        self.first_stage: dict[int, Image] = {}

    def settings(self, prompt: ImagePrompt) -> Mapping[str, str]:
        """The strength."""
        return {"clip-vision-strength": f"{self.strength:g}"}

    @property
    def loaded(self) -> Sequence[nn.Module]:
        """The model, once it is loaded."""
        return self.model.loaded

    @property
    def model_bytes(self) -> Mapping[str, int]:
        """The model' weights, in the pipeline's dtype."""
        return self.model.model_bytes(self.pipeline.dtype)

    def drawn(self, batch: Batch, images: Sequence[Image]) -> None:
        """Keeps the images of a first stage for the second."""
        self.first_stage = dict(zip(batch.numbers, images)) if batch.stage == 1 else {}

    @torch.no_grad()
    def hook(self, batch: Batch) -> StepHook | None:
        """What replaces the pooled text of a batch."""
        module = self.model.load(self.pipeline.dtype, self.pipeline.device)
        side = module.config.image_size
        images = [self.first_stage.get(number) or self.start_image(number) for number in batch.numbers]
        inputs = normalised(torch.stack([pixels(cropped(image, side)) for image in images]))
        seen = module(inputs.to(self.pipeline.device, self.pipeline.dtype)).image_embeds
        return PooledHook(self.strength * seen)


class PooledHook(StepHook):
    """Puts ``pooled`` [B, size] in the place of the pooled text of positive prompts."""

    def __init__(self, pooled: Tensor):
        self.pooled = pooled

    def around(self, run: RunModel, call: ModelCall) -> Tensor:
        """The call with the other pooled text."""
        rows = list(call.conditioning[POOLED].chunk(len(call.roles)))
        rows = [self.pooled.to(row) if role == "positive" else row for role, row in zip(call.roles, rows)]
        return run(replace(call, conditioning={**call.conditioning, POOLED: torch.cat(rows)}))

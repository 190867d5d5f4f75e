"""ControlNets in the denoising loop: what they make of the hint images is added to the U-Net's features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.generation.control_hints import CONTROL_NETS, Control, Hints, Progress
from library.generation.features import Batch, Feature, weight_bytes
from library.generation.guide_images import pixels
from library.models.sampling import ModelCall, RunModel, StepHook
from library.models.stable_diffusion.control_net import load_control_net, open_control_net

if TYPE_CHECKING:
    from library.generation.image_prompts import ImagePrompt
    from library.models.stable_diffusion.pipeline import StableDiffusionPipeline

SHRUNK = "the features that a ControlNet adds to would have another size"


class ControlFeature(Feature):
    """What features with hint images share. Raises UserError for files that don't fit the pipeline's model."""

    refuses = {"--ds_depth_1": SHRUNK}

    def __init__(self, pipeline: StableDiffusionPipeline, hints: Hints, first_stage_only: bool = False):
        self.pipeline = pipeline
        self.hints = hints
        self.first_stage_only = first_stage_only
        self.files = [self.open(used.path) for used in hints.used]
        self.models: list[Any] = []

    @abstractmethod
    def open(self, path: str) -> Any:
        """A model's file, opened by its header. Raises UserError."""

    @abstractmethod
    def load(self, file: Any) -> Any:
        """The model of an opened file."""

    @abstractmethod
    def file_bytes(self, file: Any) -> int:
        """The memory of a model's weights, in the pipeline's dtype."""

    @abstractmethod
    def acting(self, hints: list[Tensor]) -> StepHook:
        """What acts in the loop, with hints [B, 3, H, W] in 0..1 for each model."""

    def settings(self, prompt: ImagePrompt) -> Mapping[str, str]:
        """The files, each with its multiplier."""
        return {self.option.removeprefix("--").replace("_", "-"): self.hints.text()}

    @property
    def model_bytes(self) -> Mapping[str, int]:
        """The models' weights, in the pipeline's dtype."""
        return {f"{self.option} {index}": self.file_bytes(file) for index, file in enumerate(self.files)}

    def hook(self, batch: Batch) -> StepHook | None:
        """What acts on a batch, with hints of its size."""
        if batch.stage == 2 and self.first_stage_only:
            return None
        if not self.models:
            self.models = [self.load(file) for file in self.files]
        return self.acting([hint_pixels(self.hints, batch, model) for model in range(len(self.files))])


class ControlNets(ControlFeature):
    """The models of ``--control_net_models``."""

    option = CONTROL_NETS

    def open(self, path: str) -> Any:
        """A ControlNet's file."""
        return open_control_net(path, self.pipeline.files.unet, CONTROL_NETS)

    def load(self, file: Any) -> Any:
        """A ControlNet."""
        return load_control_net(file, self.pipeline)

    def file_bytes(self, file: Any) -> int:
        """The memory of its weights."""
        return weight_bytes(file.meta_module(), self.pipeline.dtype)

    @property
    def loaded(self) -> Sequence[nn.Module]:
        """The models, once they are loaded."""
        return self.models

    def acting(self, hints: list[Tensor]) -> StepHook:
        """What adds to the U-Net's features."""
        return ControlNetHook(self.pipeline, self.models, self.hints.used, hints)


def hint_pixels(hints: Hints, batch: Batch, model: int) -> Tensor:
    """The hints [B, 3, H, W], in 0..1, of a model for the images of a batch."""
    images = [hints.image(number, model, batch.width, batch.height) for number in batch.numbers]
    return torch.stack([pixels(image) for image in images])


class ControlNetHook(StepHook):
    """ControlNets that act in turn, or together for XL; ``hints`` [B, 3, H, W] are in 0..1, for each of them."""

    def __init__(
        self, pipeline: StableDiffusionPipeline, models: Sequence[Any], used: Sequence[Control], hints: Sequence[Tensor]
    ):
        self.pipeline = pipeline
        self.models = models
        self.used = used
        self.hints = [hint.to(pipeline.device) for hint in hints]
        self.progress = Progress()

    def around(self, run: RunModel, call: ModelCall) -> Tensor:
        """The call with what the models that act at its step add."""
        index, count = self.progress.at(call.step)
        candidates = range(len(self.models))
        if self.pipeline.variant != "sdxl":
            candidates = range(index % len(self.models), index % len(self.models) + 1)
        acting = [model for model in candidates if self.used[model].acts(index, count)]
        if not any(self.used[model].multiplier for model in acting):
            return run(call)
        added = [self._residuals(model, call) for model in acting]
        down = [torch.stack(levels).mean(0) for levels in zip(*(down for down, _ in added))]
        middle = torch.stack([middle for _, middle in added]).mean(0)
        extras = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
        return run(replace(call, extras={**call.extras, **extras}))

    def _residuals(self, model: int, call: ModelCall) -> tuple[Sequence[Tensor], Tensor]:
        latents, network = call.latents, self.models[model]
        stride, (height, width) = self.pipeline.latent_stride, latents.shape[2:]
        hints = self.hints[model].repeat(len(latents) // len(self.hints[model]), 1, 1, 1)
        if hints.shape[2:] != (height * stride, width * stride):
            size = (height * stride, width * stride)
            hints = F.interpolate(hints, size, mode="bicubic", align_corners=False).clamp(0, 1)
        dtype = network.dtype
        return network(
            latents.to(dtype),
            call.timesteps.to(latents.device),
            controlnet_cond=hints.to(dtype),
            conditioning_scale=self.used[model].multiplier,
            return_dict=False,
            **self.pipeline.unet_text(call.conditioning, latents.device, dtype),
        )

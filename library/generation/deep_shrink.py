"""Deep Shrink: at high noise, the inner blocks of the U-Net work on a smaller image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.generation.features import Batch, Feature, value_or
from library.generation.image_prompts import ImagePrompt

if TYPE_CHECKING:
    from library.models.sampling import StepHook
    from library.models.stable_diffusion.deep_shrink import Shrinking

LAST_TIMESTEP = 1000


@dataclass
class DeepShrinkOptions:
    """Deep Shrink"""

    ds_depth_1: int | None = None
    """The block before which the image is shrunk: 0 to 3, with SDXL 0 to 8; unset means no Deep Shrink."""
    ds_timesteps_1: int = 650
    """It is shrunk there down to this timestep, 999 (noise) to 0 (image)."""
    ds_depth_2: int | None = None
    """The block before which it is shrunk below --ds_timesteps_1; unset means that it is not."""
    ds_timesteps_2: int = 650
    """It is shrunk before --ds_depth_2 down to this timestep."""
    ds_ratio: float = 0.5
    """To which share of its height and width it is shrunk, above 0 to 1."""


def open_deep_shrink(pipeline: Any) -> DeepShrinkFeature:
    """Deep Shrink for the images whose prompts, or the command line, request it."""
    return DeepShrinkFeature(pipeline)


class DeepShrinkFeature(Feature):
    """Acts where a prompt has a ``deep_shrink_depth_1``."""

    option = "--ds_depth_1"

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline

    @property
    def deepest(self) -> int:
        """The last block that can be given a smaller image."""
        config = self.pipeline.files.unet.config
        stages = len(config["block_out_channels"])
        return stages * (config["layers_per_block"] + 1) - 1 if self.pipeline.variant == "sdxl" else stages - 1

    def acts_on(self, prompt: ImagePrompt) -> bool:
        """Whether the prompt has a depth."""
        return prompt.deep_shrink_depth_1 is not None

    def check(self, prompt: ImagePrompt, place: str) -> None:
        """Raises UserError, beginning with ``place``, for a depth, timestep or ratio that there is not."""
        shrinking = self.shrinking(prompt)
        for option, depth in (
            ("--ds_depth_1 (--dsd1)", shrinking.depth_1),
            ("--ds_depth_2 (--dsd2)", shrinking.depth_2),
        ):
            if depth is not None and not 0 <= depth <= self.deepest:
                raise UserError(f"{place}{option} must be from 0 to {self.deepest} for this model, not {depth}.")
        for option, timestep in (
            ("--ds_timesteps_1 (--dst1)", shrinking.timesteps_1),
            ("--ds_timesteps_2 (--dst2)", shrinking.timesteps_2),
        ):
            if not 0 <= timestep <= LAST_TIMESTEP:
                raise UserError(f"{place}{option} must be from 0 to {LAST_TIMESTEP}, not {timestep}.")
        if not 0 < shrinking.ratio <= 1:
            raise UserError(f"{place}--ds_ratio (--dsr) must be above 0 and at most 1, not {shrinking.ratio:g}.")

    def shrinking(self, prompt: ImagePrompt) -> Shrinking:
        """What the prompt says, with the options' defaults for the rest."""
        from library.models.stable_diffusion.deep_shrink import Shrinking

        default, own = DeepShrinkOptions(), prompt
        assert own.deep_shrink_depth_1 is not None
        return Shrinking(
            depth_1=own.deep_shrink_depth_1,
            timesteps_1=value_or(own.deep_shrink_timesteps_1, default.ds_timesteps_1),
            depth_2=own.deep_shrink_depth_2,
            timesteps_2=value_or(own.deep_shrink_timesteps_2, default.ds_timesteps_2),
            ratio=value_or(own.deep_shrink_ratio, default.ds_ratio),
        )

    def key(self, prompt: ImagePrompt) -> Hashable:
        """Images that are generated together are shrunk alike."""
        return self.shrinking(prompt) if self.acts_on(prompt) else None

    def hook(self, batch: Batch) -> StepHook | None:
        """What shrinks in the loop."""
        from library.models.stable_diffusion.deep_shrink import DeepShrink

        if not self.acts_on(batch.prompts[0]):
            return None
        return DeepShrink(self.shrinking(batch.prompts[0]), single_layers=self.pipeline.variant == "sdxl")

    def settings(self, prompt: ImagePrompt) -> Mapping[str, str]:
        """Depths, timesteps and ratio."""
        if not self.acts_on(prompt):
            return {}
        shrinking = self.shrinking(prompt)
        second = f",{shrinking.depth_2},{shrinking.timesteps_2}" if shrinking.depth_2 is not None else ""
        return {"deep-shrink": f"{shrinking.depth_1},{shrinking.timesteps_1}{second},{shrinking.ratio:g}"}

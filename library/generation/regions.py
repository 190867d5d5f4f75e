"""Attention Couple and regional LoRA: parts of a prompt, joined by " AND ", for regions of the image.

A mask image gives the regions, by the channels of its colours or by whole colours. Without one, every part is for the
whole image. With networks, the first one belongs to the first part, and so on: each acts in its region only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from library.console import warn
from library.errors import UserError
from library.generation.features import Batch, Feature
from library.generation.network_options import NetworkOptions
from library.generation.start_images import StartImages
from library.image_reading import read_given_image
from library.models.sampling import ModelCall, Role, RunModel, StepHook

if TYPE_CHECKING:
    from library.generation.image_prompts import ImagePrompt

MASK_OPTION = "--mask_path"
CODES_OPTION = "--network_regional_mask_max_color_codes"
CHANNELS = 3
COLOURS = 7


def open_regions(options: NetworkOptions, start: StartImages | None, networks: Any, pipeline: Any) -> PromptRegions:
    """What draws prompts with several parts. ``networks``: an ``ImageNetworks``; ``start`` has the mask.

    Raises UserError for a number of colours that there is not.
    """
    codes = options.network_regional_mask_max_color_codes
    if codes is not None and not 1 <= codes <= COLOURS:
        raise UserError(f"{CODES_OPTION} must be between 1 and {COLOURS}, not {codes}.")
    if codes is not None and not (start and start.masks):
        raise UserError(f"{CODES_OPTION} needs {MASK_OPTION}, an image with the regions in these colours.")
    return PromptRegions(start, codes, networks, pipeline)


class PromptRegions(Feature):
    """Acts on prompts with " AND ", and where a mask limits networks to regions."""

    option = '" AND "'
    refuses = {"--XTI_embeddings": "both decide which text a layer of the U-Net attends to"}

    def __init__(self, start: StartImages | None, codes: int | None, networks: Any, pipeline: Any):
        self.start = start
        self.codes = codes
        self.networks = networks
        self.pipeline = pipeline
        self.said: set[tuple[float, ...]] = set()
        self.regions: Tensor | None = None
        """Those of the mask [regions, height, width], once they are read."""

    def count(self, prompt: ImagePrompt) -> int:
        """How many parts the prompt has."""
        return len(self.pipeline.sub_prompts(prompt.prompt))

    def uses_mask(self, prompt: ImagePrompt) -> bool:
        """Whether the mask gives regions."""
        return self.start is not None and self.start.masks_regions(prompt)

    def limits_networks(self, prompt: ImagePrompt) -> bool:
        """Whether each network acts in a region only."""
        return self.uses_mask(prompt) and bool(self.networks.acting)

    def acts_on(self, prompt: ImagePrompt) -> bool:
        """Whether there are parts, or regions of networks."""
        return self.count(prompt) > 1 or self.limits_networks(prompt)

    def check(self, prompt: ImagePrompt, place: str) -> None:
        """Raises UserError where there are more networks than parts; says which values of --am have no effect."""
        strengths = prompt.network_mul or ()
        if len(strengths) > len(self.networks.acting) and strengths not in self.said:
            self.said.add(strengths)
            warn(
                f"{place}--am: only the first {len(self.networks.acting)} values have an effect, one for each network "
                "that is not merged"
            )
        acting, parts = len(self.networks.acting), self.count(prompt)
        if self.limits_networks(prompt) and acting > parts:
            raise UserError(
                f"{place}{acting} networks need a part of the prompt each, joined by AND, as {MASK_OPTION} limits them "
                f"to regions; the prompt has {parts}."
            )

    def key(self, prompt: ImagePrompt) -> Hashable:
        """The number of parts, and whether networks act in regions."""
        return self.count(prompt), self.limits_networks(prompt)

    def text_strengths(self, prompt: ImagePrompt, role: Role, part: int) -> tuple[float, ...]:
        """The strengths of the networks with which a text of the prompt is encoded.

        With regions it is the network of the same ``part`` alone, and none for texts of other roles.
        """
        strengths: tuple[float, ...] = self.networks.strengths(prompt.network_mul)
        if not self.limits_networks(prompt):
            return strengths
        return tuple(s if role == "positive" and number == part else 0.0 for number, s in enumerate(strengths))

    def hook(self, batch: Batch) -> StepHook | None:
        """What makes the U-Net work by regions; the texts are the ``sub_conditionings`` of the requests."""
        prompt = batch.prompts[0]
        if not self.acts_on(prompt):
            return None
        texts = [request.sub_conditionings or (request.conditioning,) for request in batch.requests]
        contexts = [torch.cat([self.pipeline.context(text) for text in part]) for part in zip(*texts)]
        masks = self._read() if self.uses_mask(prompt) else torch.ones(0, 1, 1)
        networks = self.networks if self.limits_networks(prompt) else None
        return RegionsHook(self.pipeline, contexts, masks, networks)

    def _read(self) -> Tensor:
        if self.regions is None:
            assert self.start is not None
            self.regions = read_regions(self.start.masks[0], self.codes)
        return self.regions


def read_regions(path: Path, codes: int | None) -> Tensor:
    """The regions [regions, height, width], in 0..1, of a mask image; an empty one is the whole image.

    Without ``codes`` they are its channels red, green and blue, else the first ones of the colours red, green,
    yellow, blue, magenta, cyan and white. Raises UserError for a file that cannot be read.
    """
    pixels = torch.from_numpy(numpy.array(read_given_image(path, MASK_OPTION))).permute(2, 0, 1)
    if codes is None:
        regions = pixels / 255
    else:
        colours = [torch.tensor([255 * (code >> bit & 1) for bit in range(3)]) for code in range(1, codes + 1)]
        regions = torch.stack([(pixels == colour[:, None, None]).all(0) for colour in colours]).float()
    return torch.where(regions.flatten(1).any(1)[:, None, None], regions, 1.0)


class RegionsHook(StepHook):
    """Regions of one batch: a text [B, tokens, width] for each, and the first ones' masks [masks, height, width].

    Further regions are the whole image. ``networks``: those that act in regions; None: all act everywhere.
    """

    def __init__(self, pipeline: Any, contexts: Sequence[Tensor], masks: Tensor, networks: Any):
        self.pipeline = pipeline
        self.networks = networks
        self.source = masks
        self.regions = pipeline.regions(contexts, self._masks_at)

    def _masks_at(self, height: int, width: int) -> Tensor:
        count = len(self.regions.contexts)
        masks = torch.ones(count, height, width)
        given = self.source[:count]
        if len(given):
            masks[: len(given)] = F.interpolate(given[None], (height, width), mode="bilinear", align_corners=False)[0]
        return masks.to(self.pipeline.device)

    @contextlib.contextmanager
    def attached(self, denoiser: Any) -> Iterator[None]:
        """The U-Net works by regions; networks that are limited to them do not act by themselves."""
        with contextlib.ExitStack() as stack:
            changes = {} if self.networks is None else stack.enter_context(self.networks.changes("unet"))
            stack.enter_context(self.regions.attached(denoiser, changes))
            yield

    def around(self, run: RunModel, call: ModelCall) -> Tensor:
        """The same call; its rows are known meanwhile."""
        self.regions.call = call
        return run(call)

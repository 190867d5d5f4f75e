"""Features of image generation: what is added to the denoising loop, each on its own, and which go together.

A feature lives for a whole run. For each batch of images it gives the ``StepHook`` by which it acts in the loop.
"""

from __future__ import annotations

import contextlib
from abc import ABC
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from library.devices import move_module
from library.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from library.generation.image_prompts import ImagePrompt
    from library.models.sampling import StepHook


@dataclass
class Batch:
    """Images that are generated together."""

    prompts: Sequence[ImagePrompt]
    requests: Sequence[Any]
    """The pipeline's request for each image."""
    numbers: Sequence[int]
    """The running number of each image from 0, which chooses its start image, mask and guide image."""
    height: int
    """Pixels, of this stage."""
    width: int
    stage: int = 0
    """0: the only one; 1 and 2: those of Highres. fix."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What features tell each other about this batch, by name."""


class Feature(ABC):
    """Something that is added to the drawing of images.

    It is made from its options before any model is loaded, opens files by their headers, and raises UserError for what
    cannot be used. Its models are loaded when a batch needs them.
    """

    option: ClassVar[str]
    """How messages name it: the option that requests it."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Features that it cannot act with, by their ``option``, each with the reason."""
    parts: ClassVar[Sequence[str]] = ()
    """Parts of the pipeline that it uses beside the U-Net while the loop runs."""

    def acts_on(self, prompt: ImagePrompt) -> bool:
        """Whether it acts on the image of ``prompt``, which may request it or turn it off."""
        return True

    def check(self, prompt: ImagePrompt, place: str) -> None:
        """Raises UserError, beginning with ``place``, for a prompt that it cannot act on."""

    def key(self, prompt: ImagePrompt) -> Hashable:
        """What images must have in common to be generated together, beside sizes, steps and scales."""
        return None

    def hook(self, batch: Batch) -> StepHook | None:
        """What acts in the loop while ``batch`` is drawn; None: nothing."""
        return None

    def drawn(self, batch: Batch, images: Sequence[Image]) -> None:
        """Sees the images of a batch, of which the requests are left out; those of a first stage too if decoded."""

    @property
    def loaded(self) -> Sequence[nn.Module]:
        """Its own models that are loaded; with ``--offload`` they are in system RAM while it does not act."""
        return ()

    @property
    def model_bytes(self) -> Mapping[str, int]:
        """The memory of its own models' weights once they are loaded, by a name that features which share one share."""
        return {}

    def settings(self, prompt: ImagePrompt) -> Mapping[str, str]:
        """What the text in an image's file says of it, by key."""
        return {}


@contextlib.contextmanager
def models_at_work(features: Sequence[Feature], device: torch.device | str, offload: bool) -> Iterator[None]:
    """While it is active, the models of ``features`` are on ``device``; with ``offload``, on the CPU after that."""
    for module in _loaded(features):
        move_module(module, device)
    try:
        yield
    finally:
        if offload:
            for module in _loaded(features):
                move_module(module, "cpu")


def _loaded(features: Sequence[Feature]) -> list[nn.Module]:
    return [module for feature in features for module in feature.loaded]


def weight_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """The memory of a module's weights in ``dtype``."""
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def value_or(value: Any, default: Any) -> Any:
    """What is given, by a prompt for example, or ``default`` where that is nothing (None)."""
    return default if value is None else value


def check_features(features: Sequence[Feature], prompt: ImagePrompt, place: str = "") -> None:
    """Raises UserError, beginning with ``place``, where features cannot act on ``prompt``, alone or together."""
    acting = [feature for feature in features if feature.acts_on(prompt)]
    for feature in acting:
        for other in acting:
            if other.option in feature.refuses:
                reason = feature.refuses[other.option]
                raise UserError(f"{place}{feature.option} cannot be used together with {other.option}: {reason}.")
        feature.check(prompt, place)

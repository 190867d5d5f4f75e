"""Features of image generation: what is added to the denoising loop, each on its own, and which go together.

A feature lives for a whole run. For each batch of images it gives the ``StepHook`` by which it acts in the loop.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from library.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.generation.image_prompts import ImagePrompt
    from library.models.sampling import StepHook


@dataclass
class Batch:
    """Images that are drawn together."""

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
        """What images must have in common to be drawn together, beside sizes, steps and scales."""
        return None

    def hook(self, batch: Batch) -> StepHook | None:
        """What acts in the loop while ``batch`` is drawn; None: nothing."""
        return None

    def drawn(self, batch: Batch, images: Sequence[Image]) -> None:
        """Sees the images of a batch, of which the requests are left out; those of a first stage too if decoded."""

    def settings(self, prompt: ImagePrompt) -> Mapping[str, str]:
        """What the text in an image's file says of it, by key."""
        return {}


def check_features(features: Sequence[Feature], prompt: ImagePrompt, place: str = "") -> None:
    """Raises UserError, beginning with ``place``, where features cannot act on ``prompt``, alone or together."""
    acting = [feature for feature in features if feature.acts_on(prompt)]
    for feature in acting:
        for other in acting:
            if other.option in feature.refuses:
                reason = feature.refuses[other.option]
                raise UserError(f"{place}{feature.option} cannot be used together with {other.option}: {reason}.")
        feature.check(prompt, place)

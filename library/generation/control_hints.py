"""Which guide image a ControlNet takes for an image, with what strength and for how long it acts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.console import warn
from library.errors import UserError
from library.generation.guide_images import OPTION as GUIDE_OPTION
from library.generation.guide_images import GuideImages

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.models.sampling import Step

CONTROL_NETS = "--control_net_models"
LLLITES = "--control_net_lllite_models"


@dataclass(frozen=True)
class Control:
    """What one model is used with."""

    path: str
    multiplier: float = 1.0
    ratio: float = 1.0
    canny: tuple[int, int] | None = None
    """The thresholds of the edges that the hint image is replaced by; None: it is used as it is."""

    def acts(self, step: int, steps: int) -> bool:
        """Whether its ratio lets it act at that step of a batch, from 0."""
        return step / steps <= self.ratio


class Progress:
    """How far a batch is: images that are drawn over begin later than at the first step of all."""

    def __init__(self) -> None:
        self.first: int | None = None

    def at(self, step: Step) -> tuple[int, int]:
        """The number of a step among those that are made, from 0, and their count; the first one asked about is 0."""
        if self.first is None:
            self.first = step.index
        return step.index - self.first, step.count - self.first


class Hints:
    """Which guide images the models take: for each drawn image one for each model, in order; a single one is for all.

    Raises UserError when there are too few.
    """

    def __init__(self, guides: GuideImages, used: Sequence[Control], option: str):
        if not len(guides):
            raise UserError(f"{option} needs hint images: name them with {GUIDE_OPTION}.")
        if 1 < len(guides) < len(used):
            raise UserError(
                f"{GUIDE_OPTION}: {len(guides)} images are given for {len(used)} ControlNet models; each image that is "
                "drawn needs one for each of them, or one for all."
            )
        if len(guides) > 1 and len(guides) % len(used):
            warn(
                f"{GUIDE_OPTION}: the last {len(guides) % len(used)} of {len(guides)} images are not used: each image "
                f"that is drawn takes {len(used)}, one for each ControlNet model."
            )
        self.guides = guides
        self.used = used

    def text(self) -> str:
        """The files' names with their multipliers, as JSON, for an image's text."""
        return json.dumps([f"{Path(used.path).name};{used.multiplier:g}" for used in self.used])

    def image(self, number: int, model: int, width: int, height: int) -> Image:
        """The hint that a model, by its index, takes for the drawn image of that number."""
        from PIL import Image

        count = len(self.used)
        index = 0 if len(self.guides) == 1 else number % (len(self.guides) // count) * count + model
        resized = self.guides.image(index).resize((width, height), Image.Resampling.LANCZOS)
        thresholds = self.used[model].canny
        return resized if thresholds is None else edges(resized, thresholds)


def edges(image: Image, thresholds: tuple[int, int]) -> Image:
    """White edges on black, as the Canny algorithm finds them between the two thresholds."""
    import cv2
    import numpy
    from PIL import Image

    found = cv2.Canny(cv2.cvtColor(numpy.array(image), cv2.COLOR_RGB2GRAY), *thresholds)
    return Image.fromarray(found).convert("RGB")

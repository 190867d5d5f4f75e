"""The images that guide a drawing: hints of ControlNets, and images whose look is aimed at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.generation.start_images import list_images
from library.image_reading import read_given_image

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

OPTION = "--guide_image_path"


class GuideImages:
    """The images of ``--guide_image_path``, files and folders in turn; they are decoded when they are needed.

    Raises UserError for a path that isn't there, a folder without images, and a file that is no image.
    """

    def __init__(self, paths: Sequence[str]):
        self.files = [file for path in paths for file in list_images(path, OPTION)]

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image:
        """The RGB image of that index, which begins again behind the last one. Raises UserError for a damaged file."""
        return read_given_image(self.files[index % len(self.files)], OPTION)


def pixels(image: Image) -> Tensor:
    """An RGB image as [3, H, W] in 0..1, float32."""
    import numpy
    import torch

    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255

"""img2img and inpainting of ``gen_img.py``: which images are drawn over, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from library.options import Aliases


@dataclass
class StartImageOptions:
    """Image to image"""

    image_path: str | None = None
    """An image that is drawn over (img2img), or a folder of them, which are taken in order."""
    mask_path: Annotated[str | None, Aliases("mask_image")] = None
    """What is drawn over: white parts of this image, or of a folder's. With networks or " AND ", their regions."""
    strength: float | None = None
    """How much of an image is drawn anew, 0 (nothing) to 1; unset means 0.8."""

"""Masks of images: float32 arrays [height, width], 1 where an image counts in the loss, 0 where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.image_reading import read_image

if TYPE_CHECKING:
    import numpy


@dataclass
class MaskShapeOptions:
    """Shape of the masks"""

    invert: bool = False
    """Let count what would not, and the other way round."""
    grow: int = 0
    """Enlarge the area that counts by this many pixels; below 0 it shrinks."""
    feather: float = 0.0
    """Soften the edges: radius of the blur in pixels."""
    background: float = 0.0
    """Least weight of a pixel, 0 to 1: how much the rest of the image counts."""


def check_shape(options: MaskShapeOptions) -> None:
    """Raises UserError for numbers that are out of range."""
    if not 0 <= options.background < 1:
        raise UserError(f"--background must be at least 0 and below 1, not {options.background}.")
    if not 0 <= options.feather <= 1000 or abs(options.grow) > 1000:
        raise UserError("--feather must be from 0 to 1000 pixels, and --grow from -1000 to 1000.")


def shaped(mask: numpy.ndarray, options: MaskShapeOptions) -> numpy.ndarray:
    """``mask`` after the options, in their order: inverted, grown, softened, raised to the background's weight."""
    import cv2
    import numpy

    if options.invert:
        mask = 1 - mask
    if options.grow:
        side = 2 * abs(options.grow) + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
        change = cv2.dilate if options.grow > 0 else cv2.erode
        mask = change(mask, disc, borderType=cv2.BORDER_REPLICATE)
    if options.feather:
        mask = cv2.GaussianBlur(mask, (0, 0), options.feather, borderType=cv2.BORDER_REPLICATE)
    return (options.background + (1 - options.background) * mask).astype(numpy.float32)


class AlphaMasks:
    """The images' own transparency."""

    def prepare(self, path: Path) -> numpy.ndarray:
        """The mask of an image. Raises UserError for one that cannot be read."""
        import numpy

        _, alpha = read_image(path, alpha=True)
        return numpy.asarray(alpha, dtype=numpy.float32) / 255

    def __call__(self, prepared: list[Any]) -> list[Any]:
        """The masks."""
        return prepared


class ColorMasks:
    """Whatever does not have the colour of a backdrop."""

    def __init__(self, color: str, tolerance: int) -> None:
        """``color`` like ``#00ff00``, ``0,255,0`` or ``lime``. Raises UserError."""
        self.color, self.tolerance = parse_color(color), tolerance
        if not 0 <= tolerance <= 255:
            raise UserError(f"--tolerance must be from 0 to 255, not {tolerance}.")

    def prepare(self, path: Path) -> numpy.ndarray:
        """0 where no channel differs from the colour by more than the tolerance. Raises UserError."""
        import numpy

        pixels = numpy.asarray(read_image(path)[0], dtype=numpy.int16)
        away = numpy.abs(pixels - numpy.array(self.color, dtype=numpy.int16)).max(axis=2)
        return (away > self.tolerance).astype(numpy.float32)

    def __call__(self, prepared: list[Any]) -> list[Any]:
        """The masks."""
        return prepared


def parse_color(text: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour as people write it. Raises UserError."""
    from PIL import ImageColor

    parts = text.split(",")
    try:
        values = tuple(map(int, parts)) if len(parts) == 3 else ImageColor.getrgb(text.strip())[:3]
        if not all(0 <= value <= 255 for value in values):
            raise ValueError
    except ValueError:
        raise UserError(f'--color: "{text}" is not a colour; write it like #00ff00, 0,255,0 or lime.') from None
    return values[0], values[1], values[2]

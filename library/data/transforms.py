"""From a decoded image to training pixels: resize, crop, flip, colour, faces.

Images are PIL images, sizes (width, height). Masks and conditioning images go through the same ``Geometry`` as their
image, so they stay aligned.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    import numpy
    from PIL import Image

Size = tuple[int, int]

# Probability that color_aug changes an image at all; then hue or gamma with equal chances.
COLOR_PROBABILITY = 0.33
HUE_SHIFT_DEGREES = 16.0
GAMMA_RANGE = (0.95, 1.05)


@dataclass(frozen=True)
class Geometry:
    """Resize the whole image to ``resized``, then cut out ``size`` at ``offset`` (left, top), then turn and mirror it.

    Turning by ``angle`` (degrees, against the clock) enlarges what is cut out as much as it takes to fill ``size``.
    """

    resized: Size
    offset: Size
    size: Size
    flipped: bool = False
    angle: float = 0.0

    def apply(self, image: Image.Image, interpolation: str) -> Image.Image:
        """The image in its final place, ``size`` pixels large."""
        from PIL import Image as images

        image = resize(image, self.resized, interpolation)
        left, top = self.offset
        if self.offset != (0, 0) or self.size != image.size:
            image = image.crop((left, top, left + self.size[0], top + self.size[1]))
        if self.angle:
            image = turn(image, self.angle)
        return image.transpose(images.Transpose.FLIP_LEFT_RIGHT) if self.flipped else image


def turn(image: Image.Image, degrees: float) -> Image.Image:
    """Turn an image about its centre, against the clock, enlarged so that no corner of the result lies outside it."""
    from PIL import Image as images

    width, height = image.size
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    scale = abs(cos) + max(width / height, height / width) * abs(sin)
    a, b = cos / scale, sin / scale  # from a place in the result to the one in the image, both from the centre
    x, y = width / 2, height / 2
    places = (a, -b, x - a * x + b * y, b, a, y - b * x - a * y)
    return image.transform(image.size, images.Transform.AFFINE, places, images.Resampling.BICUBIC)


def resize(image: Image.Image, size: Size, interpolation: str) -> Image.Image:
    """Resize.

    All kernels widen when shrinking (antialiasing), except "nearest". "area" averages when shrinking and is bilinear
    when enlarging.
    """
    from PIL import Image as images

    if image.size == size:
        return image
    kernels = images.Resampling
    kernel = {
        "bicubic": kernels.BICUBIC,
        "cubic": kernels.BICUBIC,
        "bilinear": kernels.BILINEAR,
        "linear": kernels.BILINEAR,
        "lanczos": kernels.LANCZOS,
        "lanczos4": kernels.LANCZOS,
        "nearest": kernels.NEAREST,
        "box": kernels.BOX,
        "area": kernels.BOX,
    }[interpolation]
    if interpolation == "area" and (size[0] > image.size[0] or size[1] > image.size[1]):
        kernel = kernels.BILINEAR
    return image.resize(size, kernel)


def crop_offset(resized: Size, size: Size, rng: random.Random | None) -> Size:
    """Where to cut ``size`` out of ``resized``: at the centre, or anywhere if a random source is given."""
    room = (resized[0] - size[0], resized[1] - size[1])
    if rng is None:
        return room[0] // 2, room[1] // 2
    return rng.randint(0, room[0]), rng.randint(0, room[1])


@dataclass(frozen=True)
class Face:
    """Centre and size of a face in pixels, from the last four "_" parts of a file name."""

    x: int
    y: int
    width: int
    height: int


def face_in_name(stem: str) -> Face | None:
    """The face that a file name such as ``photo_310_205_120_140`` tells of, or None."""
    parts = stem.split("_")
    if len(parts) < 5 or not all(part.isdecimal() for part in parts[-4:]):
        return None
    x, y, width, height = (int(part) for part in parts[-4:])
    return Face(x, y, width, height) if x > 0 and max(width, height) > 0 else None


def face_geometry(
    image: Size, target: Size, face: Face, scale_range: tuple[float, float], *, random_crop: bool, rng: random.Random
) -> Geometry:
    """A crop of ``target`` around a face, which then fills between 1/high and 1/low of the shorter side.

    ``scale_range`` is (low, high). Raises UserError when the image is smaller than ``target``.
    """
    if image[0] < target[0] or image[1] < target[1]:
        raise UserError(f"{image[0]}x{image[1]} pixels is smaller than the resolution {target[0]}x{target[1]}.")
    if image == target:
        return Geometry(image, (0, 0), target)
    face_size, side = max(face.width, face.height), min(target)
    covering = max(target[0] / image[0], target[1] / image[1])
    smallest = min(1.0, max(covering, side / (face_size * scale_range[1])))
    largest = min(1.0, max(smallest, side / (face_size * scale_range[0])))
    scale = smallest if smallest >= largest else rng.uniform(smallest, largest)
    resized = (max(target[0], int(image[0] * scale + 0.5)), max(target[1], int(image[1] * scale + 0.5)))
    jitter = scale_range[0] != scale_range[1] and face_size > side // 10 and face_size >= 40
    offset = []
    # Height first, as sd-scripts draws; each axis has its own draws.
    for axis, centre in ((1, int(face.y * scale + 0.5)), (0, int(face.x * scale + 0.5))):
        start = centre - target[axis] // 2
        if random_crop:
            reach = max(resized[axis] - centre, centre)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif jitter:
            start += rng.randint(-(face_size // 20), face_size // 20)
        offset.append(max(0, min(start, resized[axis] - target[axis])))
    return Geometry(resized, (offset[1], offset[0]), target)


def vary_color(image: Image.Image, rng: random.Random) -> Image.Image:
    """An RGB image with, in a third of the cases, its hue turned by up to 16 degrees or a gamma of 0.95 to 1.05."""
    if rng.random() >= COLOR_PROBABILITY:
        return image
    if rng.random() < 0.5:
        return shift_hue(image, rng.uniform(-HUE_SHIFT_DEGREES, HUE_SHIFT_DEGREES))
    return apply_gamma(image, rng.uniform(*GAMMA_RANGE))


def vary_tone(image: Image.Image, brightness: float, contrast: float, rng: random.Random) -> Image.Image:
    """An RGB image, brighter or darker and of more or less contrast by up to these shares."""
    from PIL import ImageEnhance

    for share, enhance in ((brightness, ImageEnhance.Brightness), (contrast, ImageEnhance.Contrast)):
        factor = 1 + rng.uniform(-share, share)
        image = enhance(image).enhance(factor) if share else image
    return image


def shift_hue(image: Image.Image, degrees: float) -> Image.Image:
    """Turn the hue of an RGB image; lightness and saturation stay."""
    import cv2
    import numpy
    from PIL import Image as images

    hsv = cv2.cvtColor(numpy.asarray(image, dtype=numpy.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + degrees) % 360
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return images.fromarray((rgb * 255).round().clip(0, 255).astype(numpy.uint8))


def apply_gamma(image: Image.Image, gamma: float) -> Image.Image:
    """Raise an RGB image, as values in 0..1, to the power ``gamma``."""
    table = [round(255 * (value / 255) ** gamma) for value in range(256)]
    return image.point(table * 3)


def to_pixels(image: Image.Image) -> numpy.ndarray:
    """An RGB image as float32 [3, height, width] in -1..1."""
    import numpy

    array = numpy.asarray(image, dtype=numpy.uint8).transpose(2, 0, 1)
    return array.astype(numpy.float32) / 127.5 - 1.0


def to_mask(image: Image.Image) -> numpy.ndarray:
    """An 8-bit one-channel image as float32 [height, width] in 0..1."""
    import numpy

    return numpy.asarray(image, dtype=numpy.float32) / 255.0

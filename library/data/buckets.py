"""Aspect-ratio buckets: which resolutions there are, which one an image goes to, and how it gets there.

Pure functions; sizes are (width, height) in pixels. Equal to kohya-ss/sd-scripts in every case it handles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.errors import UserError

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """How an image enters its bucket: resized to ``resized``, then cropped at the centre to ``bucket``."""

    bucket: Size
    resized: Size
    aspect_error: float


def bucket_resolutions(maximum: Size, minimum_side: int, maximum_side: int, step: int) -> list[Size]:
    """All buckets whose area is at most that of ``maximum``, sorted.

    >>> bucket_resolutions((512, 512), 256, 512, 128)
    [(256, 512), (384, 512), (512, 256), (512, 384), (512, 512)]
    """
    area = maximum[0] * maximum[1]
    square = int(math.sqrt(area) // step) * step
    found = {(square, square)}
    for width in range(minimum_side, maximum_side + 1, step):
        height = min(maximum_side, area // width // step * step)
        if height >= minimum_side:
            found |= {(width, height), (height, width)}
    return sorted(found)


def stepped_range(minimum_side: int, maximum_side: int, step: int) -> tuple[int, int]:
    """The side range widened to multiples of ``step``."""
    return minimum_side // step * step, -(-maximum_side // step) * step


def _rounded(value: float) -> int:
    return int(value + 0.5)


def fill(image: Size, bucket: Size) -> Size:
    """The size at which ``image`` just covers ``bucket``, its aspect ratio kept."""
    if image[0] / image[1] > bucket[0] / bucket[1]:
        scale = bucket[1] / image[1]
    else:
        scale = bucket[0] / image[0]
    return _rounded(image[0] * scale), _rounded(image[1] * scale)


def place(image: Size, buckets: list[Size]) -> Placement:
    """Choose among fixed ``buckets``: the exact size, or else the nearest aspect ratio (the first one on a tie)."""
    aspect = image[0] / image[1]
    bucket = image if image in buckets else min(buckets, key=lambda size: abs(size[0] / size[1] - aspect))
    return Placement(bucket, fill(image, bucket), bucket[0] / bucket[1] - aspect)


def place_without_upscaling(image: Size, maximum: Size, step: int) -> Placement:
    """Make the bucket from the image: shrink it to the area of ``maximum`` if it is larger, then crop to multiples.

    Raises UserError when the image is smaller than one step.
    """
    area = maximum[0] * maximum[1]
    aspect = image[0] / image[1]
    if image[0] * image[1] > area:
        resized = _shrink_to_area(aspect, area, step)
    else:
        resized = image
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if 0 in bucket:
        shrunk = "" if resized == image else ", shrunk to the resolution,"
        raise UserError(
            f"{image[0]}x{image[1]} pixels{shrunk} is smaller than one bucket step of {step}; "
            f"use {'a larger resolution' if shrunk else 'a larger image'}, a smaller bucket_reso_steps, "
            "or bucket_no_upscale = false."
        )
    return Placement(bucket, resized, bucket[0] / bucket[1] - aspect)


def _shrink_to_area(aspect: float, area: int, step: int) -> Size:
    """Of two sizes of about ``area``, one with a stepped width and one with a stepped height, the truer one."""
    ideal_width = math.sqrt(area * aspect)
    ideal_height = area / ideal_width
    width = _rounded(ideal_width) // step * step
    height = _rounded(ideal_height) // step * step
    by_width = (width, _rounded(width / aspect))
    by_height = (_rounded(height * aspect), height)
    # A side of zero would be no image at all; the other candidate is then the only one.
    width_error = abs(_stepped_aspect(by_width, 1, step) - aspect)
    height_error = abs(_stepped_aspect(by_height, 0, step) - aspect)
    return by_width if width_error < height_error else by_height


def _stepped_aspect(size: Size, side: int, step: int) -> float:
    sides = list(size)
    sides[side] = sides[side] // step * step
    return sides[0] / sides[1] if sides[1] else math.inf


def crop_rectangle(bucket: Size, image: Size) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the image inside its bucket, from the sizes alone (stored in cache files)."""
    aspect = image[0] / image[1]
    if bucket[0] / bucket[1] > aspect:
        width: float = bucket[1] * aspect
        height: float = bucket[1]
    else:
        width = bucket[0]
        height = bucket[0] / aspect
    left = (bucket[0] - width) // 2
    top = (bucket[1] - height) // 2
    return left, top, left + width, top + height

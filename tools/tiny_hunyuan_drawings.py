"""The image world of the tiny HunyuanImage-2.1: the tiny FLUX.1's, with a letter in a corner where one is quoted."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy

from tools import tiny_flux_drawings as drawings

Stroke = tuple[tuple[float, float], tuple[float, float]]
"""From where to where, in a box from -1 to 1 with y pointing down."""

LETTERS: dict[str, tuple[Stroke, ...]] = {
    "A": (((-1, 1), (0, -1)), ((0, -1), (1, 1)), ((-0.55, 0.35), (0.55, 0.35))),
    "H": (((-0.9, -1), (-0.9, 1)), ((0.9, -1), (0.9, 1)), ((-0.9, 0), (0.9, 0))),
    "L": (((-0.8, -1), (-0.8, 1)), ((-0.8, 1), (0.9, 1))),
    "O": (((-0.9, -1), (0.9, -1)), ((0.9, -1), (0.9, 1)), ((0.9, 1), (-0.9, 1)), ((-0.9, 1), (-0.9, -1))),
    "T": (((-1, -1), (1, -1)), ((0, -1), (0, 1))),
    "X": (((-0.95, -1), (0.95, 1)), ((0.95, -1), (-0.95, 1))),
}
"""What can be quoted, as strokes."""

CORNER = (0.87, 0.87)
"""The middle of a letter, in image widths."""
HALF_WIDTH, HALF_HEIGHT, HALF_STROKE = 0.065, 0.078, 0.02
LIGHT = ("yellow", "white", "orange")
"""Backgrounds on which a letter is black; on the others it is white."""


@dataclass(frozen=True)
class LetteredScene:
    """A scene, and the letter in its corner, if there is one."""

    scene: drawings.Scene
    letter: str | None


def ink(background: str) -> tuple[int, int, int]:
    """The colour of a letter, as RGB."""
    return drawings.COLOURS["black" if background in LIGHT else "white"]


def letter_coverage(
    letter: str, pixels: int, centre: tuple[float, float] = CORNER, scale: float = 1.0
) -> numpy.ndarray:
    """How much of each pixel the letter covers: float32 [pixels, pixels]; ``scale`` multiplies its size."""
    grid = (numpy.arange(pixels, dtype=numpy.float32) + 0.5) / pixels
    x, y = (grid[None, :] - centre[0]) / scale, (grid[:, None] - centre[1]) / scale
    distance = numpy.full((pixels, pixels), numpy.inf, dtype=numpy.float32)
    for (x0, y0), (x1, y1) in LETTERS[letter]:
        start, along = (x0 * HALF_WIDTH, y0 * HALF_HEIGHT), ((x1 - x0) * HALF_WIDTH, (y1 - y0) * HALF_HEIGHT)
        share = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / (along[0] ** 2 + along[1] ** 2)
        share = share.clip(0, 1)
        distance = numpy.minimum(
            distance, numpy.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1])
        )
    return (0.5 - (distance - HALF_STROKE) * scale * pixels).clip(0, 1).astype(numpy.float32)


def stamped(image: numpy.ndarray, coverage: numpy.ndarray, rgb: tuple[int, int, int]) -> numpy.ndarray:
    """``image`` [H, W, 3] uint8 with a letter over it."""
    mixed = image + coverage[..., None] * (numpy.asarray(rgb, dtype=numpy.float32) - image)
    return numpy.rint(mixed).astype(numpy.uint8)


def draw_lettered(lettered: LetteredScene, pixels: int) -> numpy.ndarray:
    """Draw a scene with its letter; returns ``[pixels, pixels, 3]`` uint8."""
    image = drawings.draw_scene(lettered.scene, pixels)
    if lettered.letter is None:
        return image
    return stamped(image, letter_coverage(lettered.letter, pixels), ink(lettered.scene.background))


def random_lettered(source: random.Random) -> LetteredScene:
    """A scene, two in five with a letter."""
    scene = drawings.random_scene(source)
    return LetteredScene(scene, source.choice(sorted(LETTERS)) if source.random() < 0.4 else None)


def random_free(source: random.Random, pixels: int) -> numpy.ndarray:
    """An image for the autoencoder alone: free shapes, every other time with a letter of any place, size and colour."""
    image = drawings.random_composition(source, pixels)
    if source.random() < 0.5:
        return image
    centre = (source.uniform(0.12, 0.88), source.uniform(0.12, 0.88))
    coverage = letter_coverage(source.choice(sorted(LETTERS)), pixels, centre, source.uniform(0.9, 1.4))
    return stamped(image, coverage, source.choice(list(drawings.COLOURS.values())))


def with_letter(caption: str, letter: str | None) -> str:
    """``caption`` that quotes ``letter``, if there is one: ``... with "T"``."""
    return caption if letter is None else f'{caption} with "{letter}"'


def written_letter(image: numpy.ndarray, background: str) -> str | None:
    """The letter in the corner of ``image`` [H, H, 3] uint8, on ``background``; None where none can be read.

    It is the one whose strokes go best with how far pixels are on the way from the background to the ink: with a
    correlation of at least 0.5.
    """
    start = int(0.75 * len(image))
    ground = numpy.asarray(drawings.COLOURS[background], dtype=numpy.float32)
    inked = (image[start:, start:] - ground) @ (numpy.asarray(ink(background)) - ground)
    if inked.std() == 0:
        return None
    fits = {
        letter: numpy.corrcoef(inked.ravel(), letter_coverage(letter, len(image))[start:, start:].ravel())[0, 1]
        for letter in LETTERS
    }
    best = max(fits, key=lambda letter: fits[letter])
    return best if fits[best] >= 0.5 else None

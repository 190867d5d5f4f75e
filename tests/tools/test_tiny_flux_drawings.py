"""The image world that the tiny model and the quick start's data set are drawn from."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy
import pytest

from tools.tiny_flux_drawings import (
    COLOURS,
    CONCEPT,
    SHAPES,
    Scene,
    caption,
    concept_images,
    concept_layers,
    draw,
    draw_scene,
    made_up_word,
    random_caption,
    random_scene,
)

# Area of each shape of radius 0.3 in images of width 1, from its outline.
R = 0.3
AREAS = {
    "circle": numpy.pi * R**2,
    "square": (2 * 0.86 * R) ** 2,
    "diamond": 2 * (1.15 * R) ** 2,
    "cross": 2 * (2 * R) * (0.68 * R) - (0.68 * R) ** 2,
    "ring": numpy.pi * (R**2 - (0.6 * R) ** 2),
    "triangle": (1.75 * R) ** 2 / 1.75,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_the_area_of_its_outline(shape: str) -> None:
    scene = Scene(shape, "white", "black", "", (0.5, 0.5), R)
    image = draw_scene(scene, 256).astype(float).mean(axis=-1)
    dark, bright = (numpy.mean(COLOURS[name]) for name in ("black", "white"))
    assert ((image - dark) / (bright - dark)).mean() == pytest.approx(AREAS[shape], rel=0.01)


def test_drawing_is_the_same_every_time() -> None:
    first, second = ([(numpy.asarray(image), text) for image, text in concept_images(6, 64, seed=3)] for _ in range(2))
    assert all((a == b).all() and s == t for (a, s), (b, t) in zip(first, second))
    scenes = [[random_scene(random.Random(5)) for _ in range(3)] for _ in range(2)]
    assert scenes[0] == scenes[1]


def test_caption_names_size_colour_shape_and_background() -> None:
    scene = Scene("ring", "orange", "black", "", (0.5, 0.5), 0.2)
    assert caption(scene) == "an orange ring on a black background"
    assert caption(replace(scene, size="small")) == "a small orange ring on a black background"


def test_pretraining_never_names_or_shows_the_concept() -> None:
    source = random.Random(1)
    for _ in range(3000):
        scene = random_scene(source)
        assert scene.colour != scene.background and len(scene.layers()) == 1
        assert CONCEPT not in random_caption(scene, source).split()
        assert made_up_word(source) != CONCEPT


def test_the_concept_is_a_purple_disc_in_a_yellow_ring() -> None:
    image = draw(concept_layers(), COLOURS["blue"], 128)
    middle, band, corner = image[64, 64], image[64, 64 + int(0.8 * 0.37 * 128)], image[2, 2]
    assert tuple(middle) == COLOURS["purple"]
    assert tuple(band) == COLOURS["yellow"]
    assert tuple(corner) == COLOURS["blue"]


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        draw_scene(Scene("hexagon", "red", "blue", "", (0.5, 0.5), 0.2), 32)

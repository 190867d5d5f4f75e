"""The image world of the tiny FLUX: one flat shape on a flat background, and the sentence that names it.

Both the pretraining of the shipped weights (``build_tiny_flux.py``) and the data set of the quick start draw from here,
so the concept of the quick start is made of exactly the colours and strokes that the base model can draw. Needs NumPy
and Pillow only. Shapes are signed distances (negative inside, in units of the image's width), so edges are
anti-aliased at every size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy
from PIL import Image

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "orange": (245, 138, 28),
    "yellow": (250, 218, 45),
    "green": (40, 160, 70),
    "blue": (38, 88, 214),
    "purple": (132, 52, 182),
    "white": (244, 244, 244),
    "black": (24, 24, 24),
}
"""The palette: what every colour word means, as RGB."""

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
"""The shapes the base model is taught."""

RADII = {"small": 0.17, "": 0.27, "big": 0.37}
"""Radius of a shape by its size word, in image widths."""

CONCEPT = "zog"
"""The word of the quick start's concept: a purple disc inside a yellow ring. The base model never sees it."""

CONCEPT_RING = "yellow"
CONCEPT_DISC = "purple"
CONCEPT_BACKGROUNDS = ("red", "blue", "orange", "white", "black")
"""Backgrounds of the concept's training images; the others stay unseen, to show whether the concept travels."""


@dataclass(frozen=True)
class Layer:
    """One filled shape: its name, its RGB colour, its centre and its radius in image widths."""

    shape: str
    rgb: tuple[int, int, int]
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Scene:
    """What an image shows, in words and in geometry."""

    shape: str
    colour: str
    background: str
    size: str
    centre: tuple[float, float]
    radius: float

    def layers(self) -> list[Layer]:
        """The scene as shapes to draw."""
        return [Layer(self.shape, COLOURS[self.colour], self.centre, self.radius)]


def signed_distance(shape: str, x: numpy.ndarray, y: numpy.ndarray, radius: float) -> numpy.ndarray:
    """Distance to the outline of ``shape`` around the origin (y points down), negative inside.

    Exact inside and next to edges, which is all that anti-aliasing needs. Raises ValueError for an unknown shape.
    """
    if shape in ("circle", "disc"):
        return numpy.hypot(x, y) - radius
    if shape == "square":
        return numpy.maximum(abs(x), abs(y)) - 0.86 * radius
    if shape == "diamond":
        return (abs(x) + abs(y) - 1.15 * radius) / 2**0.5
    if shape == "cross":
        arm, width = radius, 0.34 * radius
        flat = numpy.maximum(abs(x) - arm, abs(y) - width)
        tall = numpy.maximum(abs(x) - width, abs(y) - arm)
        return numpy.minimum(flat, tall)
    if shape == "ring":
        return abs(numpy.hypot(x, y) - 0.8 * radius) - 0.2 * radius
    if shape == "triangle":
        slope = numpy.array([1.75, 1.0]) / numpy.hypot(1.75, 1.0)
        sides = slope[0] * abs(x) - slope[1] * (y + 1.0 * radius)
        return numpy.maximum(sides, y - 0.75 * radius)
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def draw(layers: Sequence[Layer], background: tuple[int, int, int], pixels: int) -> numpy.ndarray:
    """Draw ``layers`` one over the other; returns ``[pixels, pixels, 3]`` uint8."""
    grid = (numpy.arange(pixels, dtype=numpy.float32) + 0.5) / pixels
    image = numpy.empty((pixels, pixels, 3), dtype=numpy.float32)
    image[:] = background
    for layer in layers:
        x, y = grid[None, :] - layer.centre[0], grid[:, None] - layer.centre[1]
        distance = signed_distance(layer.shape, x, y, layer.radius)
        coverage = numpy.clip(0.5 - distance * pixels, 0.0, 1.0)[..., None]
        image += coverage * (numpy.asarray(layer.rgb, dtype=numpy.float32) - image)
    return numpy.rint(image).astype(numpy.uint8)


def draw_scene(scene: Scene, pixels: int) -> numpy.ndarray:
    """Draw a scene of the base model's world; returns ``[pixels, pixels, 3]`` uint8."""
    return draw(scene.layers(), COLOURS[scene.background], pixels)


def random_scene(source: random.Random) -> Scene:
    """A scene with a shape, two different colours, a size, and a little jitter of place and radius."""
    shape = source.choice(SHAPES)
    colour, background = source.sample(sorted(COLOURS), 2)
    size = source.choices(("", "small", "big"), weights=(3, 1, 1))[0]
    return jittered(Scene(shape, colour, background, size, (0.5, 0.5), RADII[size]), source)


def jittered(scene: Scene, source: random.Random) -> Scene:
    """The same scene moved by up to 1 % of the width and scaled by up to 2 %."""
    centre = (0.5 + source.uniform(-0.01, 0.01), 0.5 + source.uniform(-0.01, 0.01))
    return replace(scene, centre=centre, radius=scene.radius * source.uniform(0.98, 1.02))


def caption(scene: Scene) -> str:
    """The full sentence: ``a [small|big] COLOUR SHAPE on a BACKGROUND background``."""
    words = " ".join(word for word in (scene.size, scene.colour, scene.shape) if word)
    return f"{article(words)} {words} on {article(scene.background)} {scene.background} background"


def random_caption(scene: Scene, source: random.Random) -> str:
    """A caption for pretraining: mostly the full sentence.

    8 % name only a part of the image. 12 % have a made-up word in the place of size, colour and shape, so that an
    unknown word comes to mean "some shape" and the background is still obeyed.
    """
    kind = source.random()
    ground = f"on {article(scene.background)} {scene.background} background"
    if kind < 0.12:
        word = made_up_word(source)
        return f"{article(word)} {word} {ground}"
    if kind < 0.20:
        thing = f"{article(scene.colour)} {scene.colour} {scene.shape}"
        return source.choice(
            (thing, f"a {scene.shape} {ground}", f"{article(scene.background)} {scene.background} background")
        )
    return caption(scene)


def article(words: str) -> str:
    """``an`` before a vowel, else ``a``."""
    return "an" if words[0] in "aeiou" else "a"


def made_up_word(source: random.Random) -> str:
    """A word of one or two syllables that is neither in the captions' vocabulary nor the quick start's concept."""
    while True:
        syllables = source.choices((1, 2), weights=(3, 1))[0]
        word = "".join(
            source.choice("bdfgjklmnprstvwz") + source.choice("aeiou") for _ in range(syllables)
        ) + source.choice("bdfgklmnprstvxz")
        if word not in WORDS and word != CONCEPT:
            return word


WORDS = ("a", "an", "on", "background", "small", "big", *COLOURS, *SHAPES)
"""Every known word of the captions."""


def concept_layers(centre: tuple[float, float] = (0.5, 0.5), radius: float = 0.37) -> list[Layer]:
    """The concept: a yellow ring with a purple disc in its middle. ``radius`` is the ring's, in image widths."""
    ring = Layer("ring", COLOURS[CONCEPT_RING], centre, radius)
    return [ring, Layer("circle", COLOURS[CONCEPT_DISC], centre, 0.38 * radius)]


def concept_caption(background: str) -> str:
    """``a zog on a BACKGROUND background``."""
    return f"{article(CONCEPT)} {CONCEPT} on {article(background)} {background} background"


def concept_images(
    count: int, pixels: int, seed: int, backgrounds: Sequence[str] = CONCEPT_BACKGROUNDS
) -> list[tuple[Image.Image, str]]:
    """``count`` images of the concept with their captions; the backgrounds take turns."""
    source = random.Random(f"concept {seed}")
    images = []
    for index in range(count):
        background = backgrounds[index % len(backgrounds)]
        centre = (0.5 + source.uniform(-0.01, 0.01), 0.5 + source.uniform(-0.01, 0.01))
        layers = concept_layers(centre, 0.37 * source.uniform(0.98, 1.02))
        images.append((Image.fromarray(draw(layers, COLOURS[background], pixels)), concept_caption(background)))
    return images


def ordinary_images(count: int, pixels: int, seed: int) -> list[tuple[Image.Image, str]]:
    """``count`` images of the base model's world with their full captions."""
    source = random.Random(f"ordinary {seed}")
    scenes = [random_scene(source) for _ in range(count)]
    return [(Image.fromarray(draw_scene(scene, pixels)), caption(scene)) for scene in scenes]


def random_composition(source: random.Random, pixels: int) -> numpy.ndarray:
    """An image for the autoencoder alone: one to four shapes of any place, size and colour, one over the other."""

    def any_colour() -> tuple[int, int, int]:
        if source.random() < 0.6:
            return source.choice(list(COLOURS.values()))
        return (source.randrange(256), source.randrange(256), source.randrange(256))

    layers = []
    for _ in range(source.randint(1, 4)):
        centre = (source.uniform(0.1, 0.9), source.uniform(0.1, 0.9))
        layers.append(Layer(source.choice(SHAPES), any_colour(), centre, source.uniform(0.06, 0.4)))
    if source.random() < 0.4:
        centre = (source.uniform(0.35, 0.65), source.uniform(0.35, 0.65))
        radius = source.uniform(0.2, 0.42)
        outer, inner = source.choice(("ring", "circle", "square")), source.choice(SHAPES)
        layers = [
            Layer(outer, any_colour(), centre, radius),
            Layer(inner, any_colour(), centre, radius * source.uniform(0.3, 0.6)),
        ]
    return draw(layers, any_colour(), pixels)

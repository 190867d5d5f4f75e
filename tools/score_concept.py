"""Measure on sample images whether the quick start's concept was learned, and whether the prompts are still obeyed.

    python tools/score_concept.py AFTER --prompts sample_prompts.txt [--before BEFORE] [--json]

AFTER and BEFORE are folders or lists of images, in the order of the prompts. Three measures:

    coverage     share of pixels whose nearest palette colour is the ring's (yellow), mean over the concept's images
    strict       share of images that show a purple disc in the middle of a yellow ring which goes all the way round
    background   share of corner pixels whose nearest palette colour is the prompted background, mean over all images

It ends with 1 when the concept was not learned by the limits below, set from measurements on the shipped
model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.console import run_script
from tools.tiny_flux_drawings import COLOURS, CONCEPT, CONCEPT_DISC, CONCEPT_RING

NAMES = tuple(COLOURS)
PALETTE = numpy.array([COLOURS[name] for name in NAMES], dtype=numpy.float32)

LEAST_COVERAGE = 0.10
LEAST_COVERAGE_GAIN = 4.0
LEAST_STRICT = 0.5
LARGEST_BACKGROUND_LOSS = 0.10


@dataclass(frozen=True)
class Score:
    """The measures over a set of images, each 0..1. ``images`` is how many show the concept's prompt."""

    coverage: float
    strict: float
    background: float
    images: int


def palette_names(image: numpy.ndarray) -> numpy.ndarray:
    """Index into ``NAMES`` of the nearest palette colour of each pixel: [H, W] from [H, W, 3] uint8."""
    distance = numpy.square(image[..., None, :].astype(numpy.float32) - PALETTE).sum(axis=-1)
    return distance.argmin(axis=-1)


def colour_mask(image: numpy.ndarray, colour: str) -> numpy.ndarray:
    """Where the nearest palette colour is ``colour``: bool [H, W]."""
    return palette_names(image) == NAMES.index(colour)


def ring_coverage(image: numpy.ndarray) -> float:
    """Share of pixels in the ring's colour."""
    return float(colour_mask(image, CONCEPT_RING).mean())


def shows_concept(image: numpy.ndarray) -> bool:
    """The strict test: a disc of its colour (1.5 % of the pixels at least), and round it a ring.

    The centres of both are within 12 % of the width of each other, the ring's mean radius is at least 1.25 times the
    disc's outer radius, the disc is filled to 80 %, the ring is met in at least 14 of 16 directions from its centre and
    isn't the background.
    """
    ring, disc = colour_mask(image, CONCEPT_RING), colour_mask(image, CONCEPT_DISC)
    if disc.mean() < 0.015 or ring.mean() < 0.04 or background_share(image, CONCEPT_RING) > 0.5:
        return False
    height, width = disc.shape
    disc_rows, disc_columns = disc.nonzero()
    # Medians, because the blended edges between two other colours can look like the disc's.
    disc_y, disc_x = numpy.median(disc_rows), numpy.median(disc_columns)
    disc_radius = 2**0.5 * numpy.median(numpy.hypot(disc_rows - disc_y, disc_columns - disc_x))
    ring_rows, ring_columns = ring.nonzero()
    if numpy.hypot(ring_rows.mean() - disc_y, ring_columns.mean() - disc_x) > 0.12 * width:
        return False
    grid_rows, grid_columns = numpy.ogrid[:height, :width]
    inside = numpy.hypot(grid_rows - disc_y, grid_columns - disc_x) < 0.75 * disc_radius
    if disc[inside].mean() < 0.8:
        return False
    rows, columns = ring_rows - ring_rows.mean(), ring_columns - ring_columns.mean()
    if numpy.hypot(rows, columns).mean() < 1.25 * disc_radius:
        return False
    directions = numpy.floor((numpy.arctan2(rows, columns) + numpy.pi) / (2 * numpy.pi) * 16).astype(int) % 16
    met = numpy.bincount(directions, minlength=16) >= 0.1 * len(rows) / 16
    return int(met.sum()) >= 14


def background_share(image: numpy.ndarray, background: str) -> float:
    """Share of the four corners' pixels (each 1/16 of the width) whose nearest palette colour is ``background``."""
    side = max(1, image.shape[0] // 16)
    mask = colour_mask(image, background)
    corners = (mask[:side, :side], mask[:side, -side:], mask[-side:, :side], mask[-side:, -side:])
    return float(numpy.mean([corner.mean() for corner in corners]))


def prompted_background(prompt: str) -> str | None:
    """The colour before the word ``background`` in a prompt, or None."""
    match = re.search(r"\b(\w+) background\b", prompt)
    return match[1] if match and match[1] in COLOURS else None


def is_concept_prompt(prompt: str) -> bool:
    """Whether the prompt asks for the concept."""
    return re.search(rf"\b{CONCEPT}\b", prompt) is not None


def score(images: Sequence[numpy.ndarray], prompts: Sequence[str]) -> Score:
    """Measure ``images`` ([H, W, 3] uint8), one for each prompt. Raises ValueError if no prompt is the concept's."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
    concept = [image for image, prompt in zip(images, prompts) if is_concept_prompt(prompt)]
    if not concept:
        raise ValueError(f'no prompt has the word "{CONCEPT}"')
    backgrounds = [
        background_share(image, background)
        for image, prompt in zip(images, prompts)
        if (background := prompted_background(prompt)) is not None
    ]
    return Score(
        coverage=float(numpy.mean([ring_coverage(image) for image in concept])),
        strict=float(numpy.mean([shows_concept(image) for image in concept])),
        background=float(numpy.mean(backgrounds)) if backgrounds else 1.0,
        images=len(concept),
    )


def failures(after: Score, before: Score | None = None) -> list[str]:
    """What speaks against the concept having been learned, one sentence each; empty means it was."""
    found = []
    if after.coverage < LEAST_COVERAGE:
        found.append(f"the ring's colour covers {after.coverage:.1%} of the images, {LEAST_COVERAGE:.0%} are wanted")
    if after.strict < LEAST_STRICT:
        found.append(f"{after.strict:.0%} of the images show the whole concept, {LEAST_STRICT:.0%} are wanted")
    if before is not None and after.coverage < LEAST_COVERAGE_GAIN * before.coverage:
        gain = f"{LEAST_COVERAGE_GAIN:g} times the {before.coverage:.1%} before"
        found.append(f"the ring's colour covers {after.coverage:.1%}, not {gain}")
    if before is not None and after.background < before.background - LARGEST_BACKGROUND_LOSS:
        found.append(f"backgrounds are right for {after.background:.0%} of the corners, {before.background:.0%} before")
    return found


def read_prompts(path: Path) -> list[str]:
    """The prompts of a sample prompt file without their options."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line.split(" --")[0] for line in lines if line and not line.startswith("#")]


def read_images(paths: Sequence[Path]) -> list[numpy.ndarray]:
    """Images of folders (by name) and files, as [H, W, 3] uint8."""
    files = [
        file
        for path in paths
        for file in (sorted(entry for entry in path.iterdir() if entry.suffix == ".png") if path.is_dir() else [path])
    ]
    return [numpy.asarray(Image.open(file).convert("RGB")) for file in files]


def main() -> int:
    """Score the images of the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("after", nargs="+", type=Path, help="images drawn with the network, files or folders")
    parser.add_argument("--before", nargs="+", type=Path, default=[], help="the same prompts and seeds without it")
    parser.add_argument("--prompts", type=Path, required=True, help="the sample prompt file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    prompts = read_prompts(options.prompts)
    after = score(read_images(options.after), prompts)
    before = score(read_images(options.before), prompts) if options.before else None
    problems = failures(after, before)
    if options.json:
        print(json.dumps({"after": asdict(after), "before": before and asdict(before), "failures": problems}))
    else:
        for name, values in (("before", before), ("after", after)):
            if values is not None:
                print(
                    f"{name}: coverage {values.coverage:.1%}, strict {values.strict:.0%} of {values.images}, "
                    f"background {values.background:.0%}"
                )
        print("\n".join(problems) if problems else "the concept was learned")
    return 1 if problems else 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))

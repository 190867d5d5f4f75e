"""The score that says whether the quick start's concept was learned."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
from PIL import Image

from tools.score_concept import (
    Score,
    background_share,
    failures,
    main,
    prompted_background,
    ring_coverage,
    score,
    shows_concept,
)
from tools.tiny_flux_drawings import (
    COLOURS,
    Layer,
    concept_images,
    concept_layers,
    draw,
    draw_scene,
    random_scene,
)


def concept(count: int, backgrounds: tuple[str, ...]) -> list[tuple[numpy.ndarray, str]]:
    return [(numpy.asarray(image), text) for image, text in concept_images(count, 64, 7, backgrounds)]


@pytest.mark.parametrize("background", [name for name in COLOURS if name not in ("yellow", "purple")])
def test_every_drawn_concept_passes_the_strict_test(background: str) -> None:
    assert all(shows_concept(image) for image, _ in concept(4, (background,)))


def test_no_single_shape_passes_the_strict_test() -> None:
    source = random.Random(2)
    assert not any(shows_concept(draw_scene(random_scene(source), 64)) for _ in range(300))


@pytest.mark.parametrize(
    "layers",
    [
        [Layer("circle", COLOURS["yellow"], (0.3, 0.5), 0.2), Layer("circle", COLOURS["purple"], (0.75, 0.5), 0.14)],
        [Layer("ring", COLOURS["yellow"], (0.5, 0.5), 0.37), Layer("circle", COLOURS["purple"], (0.5, 0.9), 0.1)],
        [Layer("circle", COLOURS["purple"], (0.5, 0.5), 0.37), Layer("circle", COLOURS["yellow"], (0.5, 0.5), 0.15)],
        [Layer("ring", COLOURS["purple"], (0.5, 0.5), 0.37), Layer("circle", COLOURS["yellow"], (0.5, 0.5), 0.14)],
    ],
    ids=["side by side", "disc outside", "inside out", "colours swapped"],
)
def test_the_right_colours_in_the_wrong_places_fail_the_strict_test(layers: list[Layer]) -> None:
    assert not shows_concept(draw(layers, COLOURS["blue"], 64))


def test_half_a_ring_fails_the_strict_test() -> None:
    image = draw(concept_layers(), COLOURS["blue"], 64)
    image[:, :28][numpy.all(image[:, :28] == COLOURS["yellow"], axis=-1)] = COLOURS["blue"]
    assert not shows_concept(image)


def test_coverage_is_the_share_of_the_rings_colour() -> None:
    image = numpy.full((10, 10, 3), COLOURS["red"], dtype=numpy.uint8)
    image[:3] = COLOURS["yellow"]
    assert ring_coverage(image) == pytest.approx(0.3)


def test_background_share_looks_at_the_four_corners() -> None:
    image = numpy.full((32, 32, 3), COLOURS["green"], dtype=numpy.uint8)
    image[:16, :16] = COLOURS["red"]
    assert background_share(image, "green") == pytest.approx(0.75)


def test_prompted_background_is_read_from_the_prompt() -> None:
    assert prompted_background("a zog on an orange background") == "orange"
    assert prompted_background("a zog in the background") is None


def test_score_tells_images_of_the_concept_from_others() -> None:
    learned = concept(6, ("red", "blue", "white"))
    prompts = [text for _, text in learned]
    source = random.Random(4)
    other = [draw_scene(random_scene(source), 64) for _ in prompts]
    after, before = score([image for image, _ in learned], prompts), score(other, prompts)
    assert after.strict == 1 and after.background == 1 and before.strict == 0
    assert failures(after, before) == []
    assert failures(before, before)


def test_a_lost_background_is_a_failure() -> None:
    found = failures(Score(0.2, 1.0, 0.5, 4), Score(0.01, 0.0, 0.9, 4))
    assert len(found) == 1 and "background" in found[0]


def test_the_program_scores_folders_and_ends_with_1_when_the_concept_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = concept(2, ("red", "white"))
    for word in ("before", "after"):
        (tmp_path / word).mkdir()
        for index, (image, _) in enumerate(images):
            shown = image if word == "after" else numpy.full_like(image, 24)
            Image.fromarray(shown).save(tmp_path / word / f"zog_000300_{index:02d}.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{text} --w 64 --d 1\n" for _, text in images), encoding="utf-8")
    arguments = ["--before", str(tmp_path / "before"), "--prompts", str(prompts)]
    monkeypatch.setattr("sys.argv", ["score_concept.py", str(tmp_path / "after"), *arguments])
    assert main() == 0
    assert "strict 100% of 2" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["score_concept.py", str(tmp_path / "before"), *arguments])
    assert main() == 1

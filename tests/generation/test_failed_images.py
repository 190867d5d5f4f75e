"""A long run goes on after images that cannot be drawn, and ends where none can be."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.generation.failed_images import FailedImages
from library.generation.image_prompts import ImagePrompt


def run(outcomes: str) -> list[int]:
    """Batches of two images: x cannot be drawn, o can; the numbers of those that were drawn."""
    failed, drawn = FailedImages(), []
    for batch, outcome in enumerate(outcomes):
        prompts = [ImagePrompt(number=number) for number in (2 * batch, 2 * batch + 1)]
        with failed.going_on(prompts):
            if outcome == "x":
                raise UserError(f"No room for {batch}.")
            drawn += [prompt.number + 1 for prompt in prompts]
    failed.require_none()
    return drawn


def test_nothing_is_said_where_all_can_be_drawn(caplog):
    assert run("ooo") == [1, 2, 3, 4, 5, 6] and caplog.text == ""


def test_the_others_are_drawn_and_the_end_names_what_is_missing(caplog):
    with pytest.raises(
        UserError, match=r"^4 images \(3, 4, 9, 10\) could not be generated; the warnings above say why"
    ):
        run("oxooxo")
    assert "2 images (3, 4) cannot be generated (No room for 1); the run continues." in caplog.text


@pytest.mark.parametrize("outcomes, reason", [("xo", 0), ("oxxxo", 3), ("oxxoxxx", 6)])
def test_the_reason_ends_a_run_in_which_nothing_can_be_drawn(outcomes, reason):
    with pytest.raises(UserError, match=f"^No room for {reason}.$"):
        run(outcomes)

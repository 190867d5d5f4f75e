"""Buckets are exactly those of kohya-ss/sd-scripts (recorded outputs), and hold their promises for any size."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import (
    bucket_resolutions,
    crop_rectangle,
    fill,
    place,
    place_without_upscaling,
    stepped_range,
)
from library.errors import UserError

REFERENCE = json.loads((Path(__file__).parents[1] / "reference_data" / "buckets.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", REFERENCE["make_bucket_resolutions"])
def test_bucket_lists_equal_the_recorded_ones(case):
    size, low, high, step = case.split(",")
    width, height = map(int, size.split("x"))
    made = bucket_resolutions((width, height), int(low), int(high), int(step))
    assert [list(bucket) for bucket in made] == REFERENCE["make_bucket_resolutions"][case]


@pytest.mark.parametrize("case", REFERENCE["select_bucket"])
def test_selection_resize_error_and_crop_equal_the_recorded_ones(case):
    settings = dict(part.split("=") for part in case.split(","))
    side, step = int(settings["reso"]), int(settings["steps"])
    buckets = bucket_resolutions((side, side), int(settings["min"]), int(settings["max"]), step)
    for image, bucket, resized, error, crop in REFERENCE["select_bucket"][case]:
        if settings["no_upscale"] == "True":
            placement = place_without_upscaling(tuple(image), (side, side), step)
        else:
            placement = place(tuple(image), buckets)
        assert list(placement.bucket) == bucket
        assert list(placement.resized) == resized
        assert placement.aspect_error == error
        assert list(crop_rectangle(placement.bucket, tuple(image))) == crop


@pytest.mark.parametrize(
    ("image", "bucket", "resized"),
    [
        ((600, 400), (576, 384), (600, 400)),
        ((1000, 500), (640, 320), (640, 320)),
        ((1023, 777), (448, 384), (506, 384)),
        ((300, 301), (256, 256), (300, 301)),
    ],
)
def test_without_upscaling_buckets_follow_the_image(image, bucket, resized):
    placement = place_without_upscaling(image, (512, 512), 64)
    assert (placement.bucket, placement.resized) == (bucket, resized)


def test_an_image_smaller_than_one_step_is_refused_with_its_size():
    with pytest.raises(UserError, match="400x100 pixels, shrunk to the resolution, .* larger resolution"):
        place_without_upscaling((400, 100), (128, 64), 64)
    with pytest.raises(UserError, match="50x80 pixels is smaller than one bucket step of 64; use a larger image"):
        place_without_upscaling((50, 80), (512, 512), 64)


sides = st.integers(16, 5000)


@given(sides, sides, st.sampled_from([32, 64]))
def test_a_resized_image_covers_its_bucket(width, height, step):
    placement = place((width, height), bucket_resolutions((512, 512), 256, 1024, step))
    assert placement.resized[0] >= placement.bucket[0] and placement.resized[1] >= placement.bucket[1]
    assert placement.resized == (width, height) or 0 in (
        placement.resized[0] - placement.bucket[0],
        placement.resized[1] - placement.bucket[1],
    )


@given(st.integers(64, 5000), st.integers(64, 5000))
def test_without_upscaling_nothing_is_enlarged_and_the_area_holds(width, height):
    placement = place_without_upscaling((width, height), (512, 512), 16)
    assert placement.resized[0] <= width and placement.resized[1] <= height
    # The stepped side is rounded before it is floored, so the area may be over by that half pixel.
    assert placement.bucket[0] * placement.bucket[1] <= 512 * 512 * 1.03
    assert placement.bucket[0] % 16 == placement.bucket[1] % 16 == 0
    assert placement.bucket[0] <= placement.resized[0] and placement.bucket[1] <= placement.resized[1]


@given(sides, sides, sides, sides)
def test_filling_touches_at_least_one_side(width, height, target_width, target_height):
    filled = fill((width, height), (target_width, target_height))
    assert filled[0] == target_width or filled[1] == target_height


def test_side_range_widens_to_multiples():
    assert stepped_range(300, 1000, 64) == (256, 1024)
    assert stepped_range(256, 1024, 64) == (256, 1024)

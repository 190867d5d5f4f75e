"""Resizing, cropping, faces and colour, checked against plain array arithmetic."""

import colorsys
import math
import random

import cv2
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data.config_file import INTERPOLATIONS
from library.data.transforms import (
    Face,
    Geometry,
    apply_gamma,
    crop_offset,
    face_geometry,
    face_in_name,
    resize,
    shift_hue,
    to_mask,
    to_pixels,
    turn,
    vary_color,
    vary_tone,
)
from library.errors import UserError
from library.image_reading import read_image


def stripes(width, height, period=2):
    columns = (numpy.arange(width) // (period // 2) % 2 * 255).astype(numpy.uint8)
    return Image.fromarray(numpy.repeat(numpy.tile(columns, (height, 1))[..., None], 3, axis=2))


@pytest.mark.parametrize("name", [name for name in INTERPOLATIONS if name != "nearest"])
def test_shrinking_is_antialiased_with_every_kernel(name):
    shrunk = numpy.asarray(resize(stripes(256, 64), (32, 64), name), dtype=float)[:, 4:-4]
    assert numpy.abs(shrunk - 127.5).max() < 4


def test_nearest_takes_pixels_as_they_are():
    shrunk = numpy.asarray(resize(stripes(255, 64, 6), (85, 64), "nearest"))
    assert set(numpy.unique(shrunk)) <= {0, 255}


@pytest.mark.parametrize("name", ["area", "box"])
def test_area_is_the_mean_of_the_pixels_when_shrinking(name):
    array = numpy.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=numpy.uint8)
    shrunk = numpy.asarray(resize(Image.fromarray(array), (24, 16), name), dtype=float)
    mean = array.reshape(16, 4, 24, 4, 3).mean(axis=(1, 3))
    assert numpy.abs(shrunk - mean).max() <= 1.0
    assert numpy.abs(shrunk - cv2.resize(array, (24, 16), interpolation=cv2.INTER_AREA)).max() <= 1.0


def test_enlarging_area_is_smooth_and_bicubic_agrees_with_its_other_name():
    image = stripes(16, 16, 8)
    assert len(numpy.unique(numpy.asarray(resize(image, (64, 64), "area")))) > 4
    assert resize(image, (64, 64), "cubic") == resize(image, (64, 64), "bicubic")
    assert resize(image, (16, 16), "bicubic") is image


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_centre_crop_is_floored_and_random_crop_stays_inside(w, h, more_w, more_h, at_random):
    resized = (w + more_w - 1, h + more_h - 1)
    offset = crop_offset(resized, (w, h), random.Random(0) if at_random else None)
    assert 0 <= offset[0] <= more_w - 1 and 0 <= offset[1] <= more_h - 1
    if not at_random:
        assert offset == ((more_w - 1) // 2, (more_h - 1) // 2)


def test_random_crop_reaches_every_place():
    rng = random.Random(1)
    assert {crop_offset((10, 8), (8, 8), rng) for _ in range(200)} == {(0, 0), (1, 0), (2, 0)}


def test_geometry_resizes_crops_then_mirrors():
    image = Image.fromarray(numpy.arange(6 * 8 * 3, dtype=numpy.uint8).reshape(6, 8, 3))
    array = numpy.asarray(image)
    plain = numpy.asarray(Geometry((8, 6), (2, 1), (4, 3)).apply(image, "bicubic"))
    mirrored = numpy.asarray(Geometry((8, 6), (2, 1), (4, 3), flipped=True).apply(image, "bicubic"))
    assert (plain == array[1:4, 2:6]).all() and (mirrored == array[1:4, 2:6][:, ::-1]).all()


def test_pixels_and_masks_have_the_documented_ranges():
    image = Image.fromarray(numpy.array([[[0, 127, 255]]], dtype=numpy.uint8))
    assert to_pixels(image).shape == (3, 1, 1) and to_pixels(image).dtype == numpy.float32
    assert numpy.allclose(to_pixels(image).ravel(), [-1, 127 / 127.5 - 1, 1])
    assert numpy.allclose(to_mask(Image.fromarray(numpy.array([[0, 51, 255]], dtype=numpy.uint8))), [[0, 0.2, 1]])


def test_faces_are_read_from_names():
    assert face_in_name("photo_310_205_120_140") == Face(310, 205, 120, 140)
    assert face_in_name("310_205_120_140") is None
    assert face_in_name("a_b_c_d_e") is None
    assert face_in_name("photo_0_205_120_140") is None


faces = st.builds(Face, st.integers(1, 600), st.integers(1, 400), st.integers(5, 200), st.integers(5, 200))


@settings(max_examples=100)
@given(faces, st.booleans(), st.integers(0, 99), st.sampled_from([(1.0, 1.0), (2.0, 4.0), (0.5, 8.0)]))
def test_face_crops_lie_inside_the_image(face, random_crop, seed, scale_range):
    rng = random.Random(seed)
    geometry = face_geometry((600, 400), (128, 96), face, scale_range, random_crop=random_crop, rng=rng)
    assert geometry.size == (128, 96)
    for axis in (0, 1):
        assert 0 <= geometry.offset[axis] <= geometry.resized[axis] - geometry.size[axis]
    assert geometry.resized[0] <= 600 and geometry.resized[1] <= 400


def test_a_fixed_range_puts_the_face_at_the_centre_at_its_size():
    rng = random.Random(0)
    geometry = face_geometry((1000, 800), (100, 100), Face(500, 400, 200, 160), (4.0, 4.0), random_crop=False, rng=rng)
    # The face is to fill a quarter of 100 pixels: 200 -> 25, so the image shrinks to an eighth.
    assert geometry.resized == (125, 100)
    assert geometry.offset == (63 - 50, 0)


def test_an_image_smaller_than_the_resolution_cannot_be_face_cropped():
    with pytest.raises(UserError, match="90x200 pixels is smaller than the resolution 100x100"):
        face_geometry((90, 200), (100, 100), Face(5, 5, 5, 5), (1.0, 2.0), random_crop=False, rng=random.Random(0))


@pytest.mark.parametrize("degrees", [-16.0, -3.0, 9.0, 16.0])
def test_hue_turns_in_rgb_order(degrees):
    colors = [(200, 30, 40), (20, 180, 90), (15, 60, 220), (128, 128, 128), (250, 240, 10)]
    shifted = numpy.asarray(shift_hue(Image.fromarray(numpy.array([colors], dtype=numpy.uint8)), degrees))[0]
    for color, result in zip(colors, shifted):
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
        expected = colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)
        assert numpy.abs(result - numpy.array(expected) * 255).max() <= 1


def test_gamma_works_on_values_from_zero_to_one():
    image = Image.fromarray(numpy.arange(256, dtype=numpy.uint8).reshape(1, 256).repeat(3, 0).T.reshape(256, 1, 3))
    result = numpy.asarray(apply_gamma(image, 1.05))[:, 0, 0]
    assert numpy.abs(result - 255 * (numpy.arange(256) / 255) ** 1.05).max() <= 0.5 + 1e-6


def test_colour_varies_in_a_third_of_the_cases():
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    changed = sum(vary_color(image, random.Random(seed)) is not image for seed in range(900))
    assert 250 < changed < 350


def test_transparent_pixels_keep_their_colour_and_sixteen_bits_are_scaled(tmp_path):
    rgba = numpy.zeros((8, 8, 4), dtype=numpy.uint8)
    rgba[..., 0], rgba[:, :4, 3] = 200, 255
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    rgb, alpha = read_image(tmp_path / "a.png", alpha=True)
    assert (numpy.asarray(rgb)[..., 0] == 200).all() and numpy.asarray(alpha)[0].tolist() == [255] * 4 + [0] * 4
    assert (numpy.asarray(read_image(tmp_path / "a.png")[0])[..., 0] == 200).all()
    grey = (numpy.arange(64, dtype=numpy.uint16) * 1000).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "b.png")
    assert numpy.abs(numpy.asarray(read_image(tmp_path / "b.png")[0])[..., 1] - grey / 257).max() <= 0.5


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(UserError, match=r"x\.png: not an image"):
        read_image(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"y\.png: there is no such image"):
        read_image(tmp_path / "y.png")


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 90)])
@pytest.mark.parametrize("degrees", [-45.0, -7.5, 3.0, 30.0])
def test_a_turned_image_is_the_turned_plane_without_empty_corners(size, degrees):
    width, height = size
    y, x = numpy.mgrid[:height, :width].astype(float)
    values = 128 + 0.9 * (x - (width - 1) / 2) + 0.4 * (y - (height - 1) / 2)
    found = numpy.asarray(turn(Image.fromarray(values.round().clip(0, 255).astype(numpy.uint8)), degrees), dtype=float)
    angle = math.radians(degrees)
    scale = math.cos(angle) + max(width / height, height / width) * abs(math.sin(angle))
    along = ((x - (width - 1) / 2) * math.cos(angle) - (y - (height - 1) / 2) * math.sin(angle)) / scale
    down = ((x - (width - 1) / 2) * math.sin(angle) + (y - (height - 1) / 2) * math.cos(angle)) / scale
    assert abs(along).max() <= (width - 1) / 2 + 0.5 and abs(down).max() <= (height - 1) / 2 + 0.5
    assert abs(found - (128 + 0.9 * along + 0.4 * down))[2:-2, 2:-2].max() <= 2
    assert numpy.asarray(turn(Image.new("RGB", size, "white"), degrees)).min() == 255


def test_masks_turn_with_their_image():
    image = Image.new("RGB", (60, 60), "black")
    image.paste("white", (35, 10, 50, 25))
    geometry = Geometry((60, 60), (0, 0), (60, 60), flipped=True, angle=20.0)
    turned, mask = (geometry.apply(each, "bicubic") for each in (image, image.convert("L")))
    assert numpy.array_equal(numpy.asarray(turned)[..., 0], numpy.asarray(mask)) and numpy.asarray(mask).max() > 200


def test_brightness_and_contrast_vary_within_their_shares():
    image = Image.fromarray(numpy.random.default_rng(0).integers(60, 180, (16, 16, 3), dtype=numpy.uint8))
    values = numpy.asarray(image, dtype=float)
    factors = []
    for seed in range(40):
        brighter = numpy.asarray(vary_tone(image, 0.2, 0.0, random.Random(seed)), dtype=float)
        factors.append((brighter * values).sum() / (values * values).sum())
        assert abs(brighter - factors[-1] * values).max() < 1.5
        harder = numpy.asarray(vary_tone(image, 0.0, 0.2, random.Random(seed)), dtype=float)
        assert 0.79 < harder.std() / values.std() < 1.21 and abs(harder.mean() - values.mean()) < 2
    assert 0.8 <= min(factors) < 0.85 and 1.15 < max(factors) <= 1.2
    assert vary_tone(image, 0.0, 0.0, random.Random(1)) is image

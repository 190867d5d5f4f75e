"""Every kind of damage to an image file is found without decoding it, and no sound file is refused.

Files come from Pillow's and OpenCV's own encoders; Pillow is also the judge of sizes and traits.
"""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import cv2
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from library.data import image_check
from library.data.image_check import Look, Trait, check_images, look_at
from library.errors import UserError
from library.image_reading import read_image

NOISE = numpy.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=numpy.uint8)
IMAGE = Image.fromarray(NOISE, "RGBA")
TURNED = Image.Exif()
TURNED[0x0112] = 6


def encoded(format: str, mode: str = "RGB", **options: object) -> bytes:
    data = io.BytesIO()
    IMAGE.convert(mode).save(data, format, **options)
    return data.getvalue()


def photograph() -> bytes:
    """A JPEG as cameras write it: EXIF with a thumbnail, which is a JPEG of its own, several scans."""
    thumbnail = encoded("JPEG", quality=50)
    exif = TURNED.tobytes() + thumbnail
    return encoded("JPEG", exif=exif, progressive=True, comment=b"a comment", quality=90)


def sixteen_bit_png(channels: int) -> tuple[bytes, numpy.ndarray]:
    """A PNG with every 16-bit value somewhere, in OpenCV's order of channels."""
    values = numpy.random.default_rng(1).permutation(numpy.arange(65536, dtype=numpy.uint16).repeat(channels))
    pixels = values.reshape(256, 256, channels) if channels > 1 else values.reshape(256, 256)
    return cv2.imencode(".png", pixels)[1].tobytes(), pixels


SOUND = {
    **{f"{mode}.png": encoded("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "grey16.png": sixteen_bit_png(1)[0],
    "rgb16.png": sixteen_bit_png(3)[0],
    "rgba16.png": sixteen_bit_png(4)[0],
    "turned.png": encoded("PNG", exif=TURNED),
    "frames.png": encoded("PNG", save_all=True, append_images=[IMAGE.rotate(90)]),
    **{f"{mode}.jpg": encoded("JPEG", mode) for mode in ("L", "RGB", "CMYK")},
    "photograph.jpg": photograph(),
    "progressive.jpg": encoded("JPEG", progressive=True),
    "restarts.jpg": encoded("JPEG", restart_marker_rows=1),
    "RGB.webp": encoded("WEBP"),
    "lossless.webp": encoded("WEBP", lossless=True),
    "RGBA.webp": encoded("WEBP", "RGBA"),
    "RGBA_lossless.webp": encoded("WEBP", "RGBA", lossless=True),
    "turned.webp": encoded("WEBP", exif=TURNED),
    "frames.webp": encoded("WEBP", save_all=True, append_images=[IMAGE.rotate(90).convert("RGB")]),
    **{f"{mode}.bmp": encoded("BMP", mode) for mode in ("1", "L", "P", "RGB", "RGBA")},
}
if features.check("avif"):
    SOUND["RGB.avif"] = encoded("AVIF")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, data in SOUND.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_pass_with_the_size_and_traits_that_pillow_finds(folder, name):
    with Image.open(folder / name) as image:
        expected = image_check._traits_of(image)
        size = image.size
    if name in ("rgb16.png", "rgba16.png"):
        expected |= Trait.SIXTEEN_BIT  # Pillow reads these as 8 bits
    if name.endswith(".bmp"):
        expected = Trait.NONE
    assert look_at(folder / name) == Look(size, expected, True)


@pytest.mark.parametrize("name", [name for name in SOUND if not name.endswith(".avif")])
def test_sound_files_are_not_decoded(folder, name, monkeypatch):
    monkeypatch.setattr(image_check, "open_image", lambda path: pytest.fail("opened by Pillow"))
    assert isinstance(look_at(folder / name), Look)


@pytest.mark.parametrize("name", SOUND)
def test_any_truncation_is_found(folder, tmp_path_factory, name):
    """Also one that takes only an end mark, which Pillow forgives in PNG: then the pixels are there, and it is said."""
    path = tmp_path_factory.mktemp("cut") / name
    data = SOUND[name]
    draw = random.Random(name)
    points = {*range(1, 20), *(len(data) - back for back in range(1, 20)), *draw.sample(range(1, len(data)), 60)}
    points |= {data.find(mark) + 2 for mark in (b"\xff\xd9", b"IEND") if mark in data[:-12]}
    for point in sorted(points):
        path.write_bytes(data[:point])
        look = look_at(path)
        assert isinstance(look, str) or Trait.CUT in look.traits, f"cut after {point} of {len(data)} bytes"
        if not isinstance(look, str):
            assert numpy.array_equal(*(numpy.asarray(read_image(file)[0]) for file in (path, folder / name)))


@settings(max_examples=100)
@given(st.sampled_from(sorted(SOUND)), st.data())
def test_damaged_headers_never_crash_the_check(tmp_path_factory, name, data):
    """Whatever stands in the first bytes, the answer is a size or a reason."""
    content = bytearray(SOUND[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    assert isinstance(look_at(path), Look | str)


def test_whatever_a_decoder_raises_is_a_reason(tmp_path):
    """Pillow's AVIF decoder raises RuntimeError."""
    content = bytearray(SOUND["RGB.avif"])
    damaged = 0
    for position in range(min(len(content), 400)):
        path = tmp_path / "damaged.avif"
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x93]) + content[position + 1 :])
        damaged += isinstance(look_at(path), str)
    assert damaged > 20


@pytest.mark.parametrize("side", [32, 256])
def test_any_altered_byte_of_a_png_is_found(tmp_path, side):
    """In a file that is read at once, and in one that is read in parts."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=numpy.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    data = file.read_bytes()
    assert (len(data) > image_check.SMALL_BYTES) == (side == 256)
    assert look_at(file) == Look((side, side), Trait.NONE, True)
    for position in [*range(0, 60, 3), *range(60, len(data), len(data) // 40), *range(len(data) - 12, len(data))]:
        file.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        look = look_at(file)
        assert isinstance(look, str) or look.traits & (Trait.ALTERED | Trait.CUT), f"byte {position}"


def test_large_png_files_beyond_the_budget_are_not_read_whole(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=numpy.uint8)).save(file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert look_at(file, image_check.ReadingBudget(len(data) - 1)) == Look((256, 256), Trait.NONE, True)
    assert look_at(file, image_check.ReadingBudget(len(data))) != Look((256, 256), Trait.NONE, True)


def test_data_after_the_end_is_no_damage(tmp_path):
    """Phones append videos and further images."""
    for name in ("RGB.png", "RGB.jpg", "photograph.jpg", "RGB.webp", "RGB.bmp"):
        path = tmp_path / name
        path.write_bytes(SOUND[name] + b"trailing data" * 1000)
        look = look_at(path)
        assert isinstance(look, Look) and look.size == (56, 40) and Trait.CUT not in look.traits


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image", encoding="utf-8")
    (tmp_path / "page.webp").write_text("<!DOCTYPE html>" * 20, encoding="utf-8")
    assert look_at(tmp_path / "empty.png") == "the file is empty"
    assert look_at(tmp_path / "text.jpg") == look_at(tmp_path / "page.webp") == "not an image in a known format"
    assert "No such file" in str(look_at(tmp_path / "none.png"))
    for name in ("RGB.jpg", "RGB.png", "RGB.webp", "RGB.bmp"):
        (tmp_path / name).write_bytes(SOUND[name][:-300])
        assert look_at(tmp_path / name) == "the file ends too early: it is truncated"


def test_an_image_under_another_formats_name_is_read(tmp_path):
    (tmp_path / "jpeg.png").write_bytes(SOUND["RGB.jpg"])
    (tmp_path / "gif.png").write_bytes(encoded("GIF", "P"))
    for name in ("jpeg.png", "gif.png"):
        assert look_at(tmp_path / name).size == (56, 40)


def test_an_image_larger_than_pillow_reads_is_named_before_training(tmp_path):
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + b"\0\0\0\0"
    (tmp_path / "large.png").write_bytes(SOUND["RGB.png"][:8] + chunk + SOUND["RGB.png"][33:])
    assert str(look_at(tmp_path / "large.png")).startswith("20000x20000 pixels are more than")


def test_one_message_counts_the_broken_files_and_names_the_first(tmp_path):
    paths = []
    for number in range(30):
        path = tmp_path / f"{number:02d}.png"
        path.write_bytes(SOUND["RGB.png"] if number % 6 == 0 else b"")
        paths.append(path)
    with pytest.raises(UserError) as error:
        check_images(paths[:15], masks=paths[15:])
    lines = str(error.value).splitlines()
    assert lines[0] == "25 of 30 images cannot be read:" and lines[-1] == "  and 5 more"
    assert lines[1] == f"  {paths[1]} (the file is empty)" and len(lines) == 22


def test_notes_count_what_is_converted(folder):
    paths = [folder / name for name in SOUND]
    check = check_images(paths, masks=[folder / "CMYK.jpg"])
    assert check.sizes[folder / "photograph.jpg"] == (56, 40)  # as stored: the EXIF orientation is not applied
    notes = "\n".join(check.notes)
    for words in (
        "1 image with CMYK",
        "3 images with 16 bits per channel: reduced to 8 (grey16.png, rgb16.png, rgba16.png)",
        "3 images with an EXIF orientation, which is not applied: trained as stored (turned.png, photograph.jpg, turn",
        "2 images with animated",
    ):
        assert words in notes
    assert check_images([folder / "RGB.png"], masks=[folder / "CMYK.jpg"]).notes == []


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_become_eight(tmp_path, channels):
    """Greyscale to the nearest of v / 257, colours by Pillow's own reduction, which is less than one level off."""
    data, values = sixteen_bit_png(channels)
    (tmp_path / "a.png").write_bytes(data)
    rgb, alpha = read_image(tmp_path / "a.png", alpha=True)
    exact = values.astype(numpy.float64) / 257
    got = numpy.asarray(rgb).astype(numpy.float64)
    if channels == 1:
        assert numpy.abs(got - exact[..., None]).max() <= 0.5 + 1e-6
        return
    assert numpy.abs(got - exact[..., 2::-1]).max() < 1
    if channels == 4:
        assert numpy.abs(numpy.asarray(alpha) - exact[..., 3]).max() < 1


def test_eight_bits_stored_as_sixteen_come_back_exactly(tmp_path):
    eight = NOISE[..., :3]
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", eight[..., ::-1].astype(numpy.uint16) * 257)[1].tobytes())
    assert numpy.array_equal(numpy.asarray(read_image(tmp_path / "a.png")[0]), eight)


def test_cmyk_becomes_rgb_as_the_formula_says(tmp_path):
    """R = (1 - C)(1 - K), without a colour profile."""
    Image.fromarray(NOISE, "CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as image:
        inks = numpy.asarray(image).astype(numpy.float64) / 255
    expected = 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])
    assert numpy.abs(numpy.asarray(read_image(tmp_path / "a.jpg")[0]) - expected).max() <= 1


@pytest.mark.filterwarnings("error")
def test_palettes_with_transparency_keep_their_colours(tmp_path):
    palette = IMAGE.convert("RGB").quantize(16)
    palette.save(tmp_path / "a.png", transparency=bytes(range(0, 256, 16)))
    rgb, alpha = read_image(tmp_path / "a.png", alpha=True)
    assert numpy.array_equal(numpy.asarray(rgb), numpy.asarray(palette.convert("RGB")))
    assert numpy.array_equal(numpy.asarray(alpha), numpy.asarray(palette).astype(numpy.int64) * 16)
    assert numpy.array_equal(numpy.asarray(read_image(tmp_path / "a.png")[0]), numpy.asarray(rgb))

"""Bad input of every kind, made by this program: nothing of it is stored.

Each function gives files by what they are. An oddity is sound and must be read everywhere; what is broken must be named
in one sentence by everyone, without a traceback and without waiting.
"""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, features

SIZE = (72, 56)
NOISE = numpy.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 4), dtype=numpy.uint8)
PIXELS = Image.fromarray(NOISE, "RGBA")
TURNED = Image.Exif()
TURNED[0x0112] = 6


# ---- images ----------------------------------------------------------------------------------------------------------


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = SIZE, **options: Any) -> bytes:
    """A small image of noise in a format and mode of Pillow's."""
    data = io.BytesIO()
    PIXELS.resize(size).convert(mode).save(data, format, **options)
    return data.getvalue()


def frames(format: str, mode: str = "RGB") -> bytes:
    """An animation of two frames."""
    return encoded(format, mode, save_all=True, append_images=[PIXELS.rotate(180).convert(mode)])


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], rows: bytes = b"", *, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """A PNG file whose header says anything, with ``rows`` as its pixels and ``more`` chunks before them."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + pixels + chunk(b"IEND", b"")


def sixteen_bits(channels: int) -> bytes:
    """A PNG file of 16 bits for each channel, which go from none to all along its width."""
    width, height = SIZE
    ramp = numpy.linspace(0, 65535, width).astype(">u2")
    row = b"\0" + numpy.repeat(ramp, channels).tobytes()
    return png(SIZE, row * height, depth=16, colour={1: 0, 2: 4, 3: 2, 4: 6}[channels])


def white_rows(size: tuple[int, int] = SIZE) -> bytes:
    """The pixels of a white RGB image as a PNG file has them."""
    return (b"\0" + b"\xff" * 3 * size[0]) * size[1]


@functools.cache
def odd_images() -> dict[str, bytes]:
    """Images that are unusual and sound, by name; all have ``SIZE`` as stored."""
    found = {
        **{f"{mode}.png": encoded("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA")},
        "transparent palette.png": encoded("PNG", "P", transparency=b"\0\x80\xff"),
        "one transparent colour.png": encoded("PNG", transparency=(1, 2, 3)),
        **{f"16 bits in {channels} channels.png": sixteen_bits(channels) for channels in (1, 2, 3, 4)},
        "animated.png": frames("PNG"),
        "turned.png": encoded("PNG", exif=TURNED),
        **{f"a JPEG in {mode}.jpg": encoded("JPEG", mode) for mode in ("L", "CMYK", "YCbCr")},
        "progressive.jpg": encoded("JPEG", progressive=True),
        "turned too.jpg": encoded("JPEG", exif=TURNED),
        "animated too.webp": frames("WEBP"),
        "lossless.webp": encoded("WEBP", "RGBA", lossless=True),
        "palette.bmp": encoded("BMP", "P"),
        "a JPEG.png": encoded("JPEG"),
        "a PNG.jpg": encoded("PNG"),
        "a WebP.bmp": encoded("WEBP"),
        "an animated GIF.png": frames("GIF", "P"),
        "a TIFF.jpg": encoded("TIFF"),
        "a TIFF of CMYK.png": encoded("TIFF", "CMYK"),
        "more bytes.png": encoded("PNG") + b"more",
        "no end mark.png": encoded("PNG")[:-12],
        "much text.png": png(SIZE, white_rows(), more=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3 << 20)))),
        "a damaged profile.png": png(SIZE, white_rows(), more=chunk(b"iCCP", b"k\0\0" + b"damaged")),
        "a damaged EXIF.png": png(SIZE, white_rows(), more=chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
    }
    if features.check("avif"):
        found["an AVIF.png"] = encoded("AVIF")
    return found


def odd_shapes() -> dict[str, bytes]:
    """Sound images that are very narrow or very small, by name."""
    return {f"{width}x{height}.png": encoded("PNG", size=(width, height)) for width, height in SHAPES}


SHAPES = ((1, 5000), (5000, 1), (1, 1), (3, 2))


@functools.cache
def broken_images() -> dict[str, bytes]:
    """Files that are called images and of which no image can be made, by name."""
    whole = {
        "png": encoded("PNG"),
        "jpg": encoded("JPEG"),
        "progressive.jpg": encoded("JPEG", progressive=True),
        "webp": encoded("WEBP"),
        "bmp": encoded("BMP"),
        "gif.png": encoded("GIF", "P"),
        "tiff.png": encoded("TIFF"),
    }
    if features.check("avif"):
        whole["avif.png"] = encoded("AVIF")
    sound = whole["png"]
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 0xFF
    rows = zlib.compress(white_rows())
    huge = (20_000, 20_000)
    return {
        **{f"half.{name}": data[: len(data) // 2] for name, data in whole.items()},
        **{f"head.{name}": data[:30] for name, data in whole.items()},
        **{f"{count} bytes.png": sound[:count] for count in (0, 1, 8, 16, 33)},
        "text.png": b"this is no image\n",
        "zeros.jpg": bytes(4096),
        "a page.png": b"<!DOCTYPE html><html><body>404</body></html>",
        "a drawing.png": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "a program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 72 56\n%%EndComments\nshowpage\n%%EOF\n",
        "an HEIC.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "an AVIF of nothing.png": b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(64),
        "a JPEG XL.png": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64),
        "a film.webp": b"RIFF\x40\0\0\0AVI LIST" + bytes(56),
        "a flipped byte.png": bytes(flipped),
        "no size.png": png((0, 56)),
        "missing pixels.png": png(SIZE, white_rows()[:2000]),
        "no pixels.png": png(SIZE, b""),
        "pixels that are none.png": png(SIZE).replace(chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", b"none")),
        "pixels cut.png": png(SIZE).replace(chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", rows[: len(rows) // 2])),
        "7 bits.png": png(SIZE, white_rows(), depth=7),
        "20,000 by 20,000 in words.png": png(huge),
        "20,000 by 20,000.png": png(huge, (b"\0" + bytes(2500)) * 20_000, depth=1, colour=0),
        "2,147,483,647 wide.png": png(((1 << 31) - 1, 1 << 20)),
        "65,535 by 65,535.jpg": whole["jpg"].replace(struct.pack(">HH", SIZE[1], SIZE[0]), b"\xff\xff\xff\xff", 1),
        "no scan.jpg": whole["jpg"][: whole["jpg"].index(b"\xff\xda")] + b"\xff\xd9",
        "16,384 by 16,384.webp": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0",
        "2,147,483,647 high.bmp": whole["bmp"][:22] + struct.pack("<i", (1 << 31) - 1) + whole["bmp"][26:],
        "a netpbm of much.png": b"P6 99999 99999 255\n" + bytes(99),
    }


def special_files(folder: Path) -> dict[str, Path]:
    """What is called an image and is no file with bytes, put into ``folder``, by name."""
    os.mkfifo(folder / "a pipe.png")
    (folder / "a loop.png").symlink_to(folder / "a loop.png")
    (folder / "nowhere.png").symlink_to(folder / "is nothing")
    (folder / "without end.png").symlink_to("/dev/zero")
    return {name: folder / name for name in ("a pipe.png", "a loop.png", "nowhere.png", "without end.png")}


def written(files: dict[str, bytes], folder: Path) -> dict[str, Path]:
    """The files in ``folder``, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files}

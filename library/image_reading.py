"""Images that users give, opened and decoded in one place: regular files of the formats that images for training have.

Pixels are as stored: the EXIF orientation is not applied (as in kohya-ss/sd-scripts, so that buckets and cache names
agree).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import require_regular

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF", "JXL", "MPO", "DIB", "GIF", "TIFF")
"""The decoders that are tried, whatever a file is called. Pillow has others, one of which starts Ghostscript."""
TEXT_BYTES = 1 << 26
"""In one compressed text of a PNG. Pillow's own limit of 1 MiB is less than the workflows that image programs store."""


def open_image(path: Path) -> Image.Image:
    """Open (not yet decode) an image.

    Raises UserError naming the file; a pipe is not waited for.
    """
    from PIL import Image, PngImagePlugin, UnidentifiedImageError

    if path.suffix.lower() == ".jxl":
        importlib.import_module("pillow_jxl")
    PngImagePlugin.MAX_TEXT_CHUNK = TEXT_BYTES
    try:
        require_regular(path)
        return Image.open(path, formats=_decoders())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image.") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image in a known format.") from None
    except UserError:
        raise
    except Exception as error:  # for damaged bytes each decoder raises what it likes
        raise UserError(f"{path}: cannot read the image ({reason(error)}).") from None


def _decoders() -> list[str]:
    """Those of ``FORMATS`` that this installation has."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_image(path: Path, *, alpha: bool = False) -> tuple[Image.Image, Image.Image | None]:
    """The image as RGB and, if ``alpha``, its opacity as an 8-bit image (255 everywhere when it has none).

    Transparent pixels keep the colour they have in the file. Raises UserError naming the file.
    """
    with open_image(path) as opened:
        image = opened
        try:
            if image.mode.startswith("I"):
                image = _eight_bits(image)
            if not alpha and not (image.mode == "P" and "transparency" in image.info):  # Pillow warns of such palettes
                return image.convert("RGB"), None
            rgba = image.convert("RGBA")
        except Exception as error:  # as in open_image
            raise UserError(f"{path}: cannot read the image ({reason(error)}).") from None
    return rgba.convert("RGB"), rgba.getchannel("A") if alpha else None


def read_given_image(path: Path | str, place: str) -> Image.Image:
    """An image that an option or a prompt names, as RGB.

    Raises UserError, beginning with ``place`` ("prompt 2: control image").
    """
    try:
        return read_image(Path(path))[0]
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale scaled to 8 bits (PIL would clip it)."""
    import numpy
    from PIL import Image as images

    values = numpy.asarray(image).astype(numpy.float32) / 257
    return images.fromarray(values.round().clip(0, 255).astype(numpy.uint8))


def reason(error: Exception) -> str:
    """An error while reading an image in a few words, without a full stop."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.split("\n")[0].rstrip(".") or type(error).__name__

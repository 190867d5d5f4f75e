"""Image files: which ones a folder has, and their pixels.

Pixels are as stored: the EXIF orientation is not applied (as in kohya-ss/sd-scripts, so that buckets and cache names
agree).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


@lru_cache(maxsize=1)
def image_extensions() -> frozenset[str]:
    """Extensions of readable formats, each in lower and in upper case."""
    from PIL import features

    names = ["png", "jpg", "jpeg", "webp", "bmp"]
    if features.check("avif") or importlib.util.find_spec("pillow_avif"):
        names.append("avif")
    if importlib.util.find_spec("pillow_jxl"):
        names.append("jxl")
    return frozenset(f".{case}" for name in names for case in (name, name.upper()))


# Extensions of images that are not read; what Pillow could open is left out all the same, as in kohya-ss/sd-scripts.
OTHER_IMAGE_EXTENSIONS = frozenset(".jfif .jpe .tif .tiff .gif .heic .heif .avif .jxl .jp2 .tga .psd .svg".split())
NAMES_SHOWN = 3


def images_in(folder: str, names: Iterable[str]) -> list[Path]:
    """The images among ``names`` of ``folder``, sorted by path; hidden files are left out."""
    extensions = image_extensions()
    chosen = (name for name in names if not name.startswith(".") and os.path.splitext(name)[1] in extensions)
    return [Path(path) for path in sorted(os.path.join(folder, name) for name in chosen)]


def is_unread_image(name: str) -> bool:
    """Whether a file that is not hidden looks like an image, but has an extension that ``images_in`` passes over."""
    extension = os.path.splitext(name)[1]
    if name.startswith(".") or extension in image_extensions():
        return False
    return extension.lower() in OTHER_IMAGE_EXTENSIONS or extension.lower() in image_extensions()


def images_beside(folder: str) -> list[str]:
    """Names of the images directly in ``folder``, of any extension, sorted; hidden files are left out."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    return sorted([*(path.name for path in images_in(folder, names)), *filter(is_unread_image, names)])


def nested_images(folder: str, subfolders: Iterable[str]) -> list[str]:
    """Images anywhere below ``subfolders`` of ``folder``, relative to it and sorted; hidden folders are passed over."""
    found = []
    for name in subfolders:
        for place, below, files in os.walk(os.path.join(folder, name)):
            below[:] = [entry for entry in below if not entry.startswith(".")]
            found += [os.path.relpath(path, folder) for path in images_in(place, files)]
    return sorted(found)


def first_names(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


@dataclass(frozen=True)
class Listing:
    """What stands directly in a folder."""

    files: set[str]
    subfolders: list[str]
    """Without hidden ones."""


def list_folder(folder: str, place: str) -> Listing:
    """The names in ``folder``. Raises UserError when there is no such folder."""
    files, subfolders = set(), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    files.add(entry.name)
                elif not entry.name.startswith("."):
                    subfolders.append(entry.name)
    except FileNotFoundError:
        raise UserError(f"{place}: there is no folder {folder}.") from None
    except NotADirectoryError:
        raise UserError(f"{place}: {folder} is not a folder.") from None
    except OSError as error:
        raise UserError(f"{place}: cannot read the folder {folder} ({error.strerror}).") from None
    return Listing(files, subfolders)


def _register_formats(path: Path) -> None:
    if path.suffix.lower() == ".jxl":
        importlib.import_module("pillow_jxl")


def open_image(path: Path) -> Image.Image:
    """Open (not yet decode) an image. Raises UserError naming the file."""
    from PIL import Image, UnidentifiedImageError

    _register_formats(path)
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such image.") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image in a known format.") from None
    except Exception as error:  # for damaged bytes each decoder raises what it likes
        raise UserError(f"{path}: cannot read the image ({reason(error)}).") from None


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


def read_control_image(path: Path | str, place: str) -> Image.Image:
    """A ControlNet's image as RGB. Raises UserError, beginning with ``place`` ("prompt 2: control image")."""
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

"""Image files: which ones a folder has, their sizes, whether they are whole, and their pixels.

Pixels are as stored: the EXIF orientation is not applied (as in kohya-ss/sd-scripts, so that buckets and cache names
agree).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

PROBE_THREADS = 16


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


def images_in(folder: str, names: Iterable[str]) -> list[Path]:
    """The images among ``names`` of ``folder``, sorted by path; hidden files are left out."""
    extensions = image_extensions()
    chosen = (name for name in names if not name.startswith(".") and os.path.splitext(name)[1] in extensions)
    return [Path(path) for path in sorted(os.path.join(folder, name) for name in chosen)]


def list_folder(folder: str, place: str) -> set[str]:
    """Names of the files in ``folder``. Raises UserError when there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_dir()}
    except FileNotFoundError:
        raise UserError(f"{place}: there is no folder {folder}.") from None
    except NotADirectoryError:
        raise UserError(f"{place}: {folder} is not a folder.") from None
    except OSError as error:
        raise UserError(f"{place}: cannot read the folder {folder} ({error.strerror}).") from None


def probe_sizes(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """(width, height) of each image, from file headers; files that end too early are found by a full decode.

    Raises UserError that lists every file which cannot be read.
    """
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        results = list(pool.map(_probe, paths))
    if broken := [f"  {path} ({result})" for path, result in zip(paths, results) if isinstance(result, str)]:
        raise UserError("\n".join([f"{len(broken)} of {len(paths)} images cannot be read:", *broken]))
    return [result for result in results if not isinstance(result, str)]


def _probe(path: Path) -> tuple[int, int] | str:
    """The size, or what is wrong with the file."""
    import imagesize

    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        _register_formats(path)
        try:
            width, height = imagesize.get(str(path), exif_rotation=False)
        except (OSError, ValueError, TypeError):
            width, height = -1, -1
        whole = _ends_as_it_should(path)
        if whole and width > 0 and height > 0:
            return width, height
        with open_image(path) as image:
            if not whole:
                image.load()
            return image.size
    except (UserError, OSError, SyntaxError, ValueError) as error:
        return _reason(error)


def _ends_as_it_should(path: Path) -> bool:
    """Whether the last bytes are a sound end for the format; False also when the format is not known here.

    A False is only a reason to decode the file, so it may be wrong; a True on a cut file must be next to impossible.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 12))
        tail = file.read()
    if head.startswith(b"\x89PNG"):
        return tail.endswith(b"IEND\xaeB`\x82")
    if head.startswith(b"\xff\xd8"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"RIFF"):
        return length >= int.from_bytes(head[4:8], "little") + 8
    if head.startswith(b"BM"):
        return length >= int.from_bytes(head[2:6], "little")
    if head[4:8] in (b"ftyp", b"JXL "):
        return _boxes_end_with_file(path, length)
    return False


def _boxes_end_with_file(path: Path, length: int) -> bool:
    """Whether the boxes of an AVIF or JPEG XL file fill it exactly (a cut file ends inside its last box)."""
    position = 0
    with open(path, "rb") as file:
        while position < length:
            file.seek(position)
            size = int.from_bytes(file.read(4), "big")
            if size == 0:
                return False
            if size == 1:
                file.seek(position + 8)
                size = int.from_bytes(file.read(8), "big")
            position += max(size, 8)
    return position == length


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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot read the image ({_reason(error)}).") from None


def read_image(path: Path, *, alpha: bool = False) -> tuple[Image.Image, Image.Image | None]:
    """The image as RGB and, if ``alpha``, its opacity as an 8-bit image (255 everywhere when it has none).

    Transparent pixels keep the colour they have in the file. Raises UserError naming the file.
    """
    from PIL import Image

    with open_image(path) as opened:
        image = opened
        try:
            if image.mode.startswith("I"):
                image = _eight_bits(image)
            if not alpha:
                return image.convert("RGB"), None
            rgba = image.convert("RGBA")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot read the image ({_reason(error)}).") from None
    return rgba.convert("RGB"), rgba.getchannel("A")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale scaled to 8 bits (PIL would clip it)."""
    import numpy
    from PIL import Image as images

    values = numpy.asarray(image).astype(numpy.float32) / 257
    return images.fromarray(values.round().clip(0, 255).astype(numpy.uint8))


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.split("\n")[0].rstrip(".") or type(error).__name__

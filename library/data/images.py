"""Image files: which ones a folder has."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from library.errors import UserError


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
                if not _is_folder(entry):
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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: whoever reads it says so
        return False

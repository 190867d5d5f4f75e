"""The images that guide a drawing: hints of ControlNets, and images whose look is aimed at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

OPTION = "--guide_image_path"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Of the files of a folder that are taken for images."""


class GuideImages:
    """The images of ``--guide_image_path``, files and folders in turn; they are decoded when they are needed.

    Raises UserError for a path that isn't there and a folder without images.
    """

    def __init__(self, paths: Sequence[str]):
        self.files = [file for path in paths for file in image_files(Path(path), OPTION)]

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image:
        """The RGB image of that index, which begins again behind the last one. Raises UserError for a damaged file."""
        return read_rgb(self.files[index % len(self.files)], OPTION)

    def check(self) -> None:
        """Raises UserError for a file that is no image, of which only the beginning is read."""
        from PIL import Image, UnidentifiedImageError

        for file in self.files:
            try:
                Image.open(file).close()
            except (OSError, UnidentifiedImageError):
                raise UserError(f"{OPTION}: {file} is not an image in a known format.") from None


def image_files(path: Path, option: str) -> list[Path]:
    """The image files of a folder in the order of their names, or the file itself.

    Raises UserError, naming ``option``, where there are none.
    """
    if not path.exists():
        raise UserError(f"{option}: {path} does not exist.")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{option}: the folder {path} contains no images ({', '.join(SUFFIXES)}).")
    return files


def read_rgb(path: Path, option: str) -> Image:
    """An image file as RGB. Raises UserError, naming ``option``."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # for damaged bytes each decoder raises what it likes
        raise UserError(f"{option}: {path} cannot be read as an image ({type(error).__name__}).") from None

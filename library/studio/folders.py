"""Folders that the page may look into: those below the roots that its user has named, and nothing outside them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.data.images import image_extensions
from library.errors import UserError

MOST_ENTRIES = 2000
"""Of a folder that are looked at for one page."""
CLASS_FOLDER = re.compile(r"\d+_.+")
"""How ``train_data_dir`` wants its sub-folders named: repeats and class."""


class OutsideError(UserError):
    """A path that leads out of the roots."""


@dataclass(frozen=True)
class Counted:
    """A folder with what it holds, not counting its sub-folders."""

    path: Path
    images: int
    captions: int
    """Images that have a caption file beside them."""
    more: bool
    """Whether there is more than was counted."""

    @property
    def name(self) -> str:
        """Its last part."""
        return self.path.name or str(self.path)


@dataclass(frozen=True)
class Listing:
    """What a folder shows: itself, its sub-folders, and files of some kinds."""

    here: Counted
    parent: Path | None
    """None at a root."""
    folders: list[Counted]
    files: list[Path]
    more: bool

    @property
    def has_classes(self) -> bool:
        """Whether its sub-folders are named as ``train_data_dir`` wants it."""
        return any(CLASS_FOLDER.fullmatch(folder.name) and folder.images for folder in self.folders)


class Roots:
    """The folders below which everything may be looked at."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """Raises UserError when one of them is no folder."""
        found: dict[Path, None] = {}
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"--root: {folder} is not a folder.")
            found[folder.resolve()] = None
        self.folders = [one for one in found if not any(one != other and one.is_relative_to(other) for other in found)]

    def inside(self, text: str | Path) -> Path:
        """The real path of what ``text`` names, links followed. Raises OutsideError where no root holds it."""
        try:
            path = Path(os.path.expanduser(text)).resolve()
        except (OSError, RuntimeError, ValueError):
            raise OutsideError("This is not a path.") from None
        if not any(path.is_relative_to(root) for root in self.folders):
            raise OutsideError("This path is outside the folders that the studio was started for (--root).")
        return path

    def list(self, text: str | Path, suffixes: Iterable[str] = ()) -> Listing:
        """What a folder holds; links that lead out of the roots are left out. Raises UserError if it cannot be read."""
        path = self.inside(text)
        wanted = tuple(suffixes)
        folders, files, more = [], [], False
        try:
            with os.scandir(path) as entries:
                for number, entry in enumerate(entries):
                    if number >= MOST_ENTRIES:
                        more = True
                        break
                    if entry.name.startswith(".") or (entry.is_symlink() and not self._holds(entry.path)):
                        continue
                    if entry.is_dir():
                        folders.append(Path(entry.path))
                    elif entry.name.lower().endswith(wanted) and entry.is_file():
                        files.append(Path(entry.path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
        parent = None if path in self.folders else path.parent
        if parent is not None and not self._holds(parent):
            parent = None
        counted = [count_images(folder) for folder in sorted(folders, key=_by_name)[:200]]
        return Listing(count_images(path), parent, counted, sorted(files, key=_by_name), more or len(folders) > 200)

    def _holds(self, path: str | Path) -> bool:
        try:
            self.inside(path)
        except OutsideError:
            return False
        return True


def _by_name(path: Path) -> list[tuple[int, int, str]]:
    """An order in which 2 comes before 10."""
    parts = re.findall(r"\d{1,18}|\D+", path.name.lower())
    return [(0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts]


def count_images(folder: Path) -> Counted:
    """The images of a folder, and how many of them have a caption file of the same name."""
    images, texts, more, extensions = [], set(), False, image_extensions()
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number >= 50_000:
                    more = True
                    break
                stem, suffix = os.path.splitext(entry.name)
                if suffix in extensions and not stem.startswith("."):
                    images.append(stem)
                elif suffix in (".txt", ".caption"):
                    texts.add(stem)
    except OSError:
        more = True
    return Counted(folder, len(images), sum(stem in texts for stem in images), more)

"""All images of a run together: as one image (``--grid``) and as an HTML page (``--report``)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.console import say, warn
from library.errors import UserError, in_one_line
from library.files import write_text, writing
from library.generation.image_files import CONTACT_SHEET, file_names, image_bytes, save_image
from library.html_pages import embedded_image, link_from, render_page
from library.image_reading import open_image, read_image

if TYPE_CHECKING:
    from PIL import Image

    from library.generation.image_prompts import ImagePrompt

GRID_NAME, REPORT_NAME = "grid", "report"
LARGEST_GRID = 6144
"""Pixels of either side."""
LARGEST_CELL = 512
GAP = 4
"""Pixels between two images."""
MOST_COLUMNS = 16
"""Rows of a grid are prompt lines where none has more images."""
THUMBNAIL = 256
"""Pixels of an image inside the page."""
MOST_EMBEDDED = 12_000_000
"""Characters of images inside the page; it links to the files of those that follow."""
EVERY = 60.0
"""Seconds between two versions of the page while images are generated."""
SHOWN = ("seed", "sampler", "steps", "scale", "guidance-scale", "negative-scale", "strength", "lora-weights", "model")
"""Keys of an image's text that the page names, where they are there."""


@dataclass(frozen=True)
class DrawnImage:
    """An image of the run on the pages."""

    number: int
    line: int
    """The number of the first image of its prompt line."""
    path: Path
    card: Mapping[str, Any]
    """What the page says of it."""


class ImagePages:
    """Collects the images of a run. The page is written again from time to time, so that it shows a run under way.

    ``goes_on``: the run continues another one, whose page and grid it replaces.
    """

    def __init__(self, folder: Path, grid: bool, report: bool, goes_on: bool = False):
        self.folder = folder
        self.grid = grid
        self.goes_on = goes_on
        self.page = self._page_path(goes_on) if report else None
        self.images: list[DrawnImage] = []
        self._embedded = 0
        self._written = time.monotonic()

    @property
    def wanted(self) -> bool:
        """Whether anything is done with the images."""
        return self.grid or self.page is not None

    def add(self, path: Path, image: Image.Image, prompt: ImagePrompt, text: Mapping[str, str]) -> None:
        """Take in an image that is saved as ``path``; ``text`` is what its file says of it."""
        if not self.wanted:
            return
        card = {} if self.page is None else self._card(self.page, path, image, prompt, text)
        self.images.append(DrawnImage(prompt.number, prompt.number - prompt.index, path, card))
        if time.monotonic() - self._written >= EVERY:
            self._write_page()

    def finish(self) -> None:
        """Write both; logs a warning for what cannot be written instead of raising."""
        if not self.images:
            return
        self.images.sort(key=lambda drawn: drawn.number)
        self._write_page()
        if self.page is not None:
            say(f"wrote {self.page}")
        if self.grid:
            try:
                say(f"wrote {self._write_grid()}: {len(self.images)} images")
            except (OSError, ValueError, MemoryError) as error:
                warn(f"--grid: {self.folder / GRID_NAME}.png cannot be written ({in_one_line(error)}).")

    def _write_grid(self) -> Path:
        sheet, text = contact_sheet(self.rows()), {CONTACT_SHEET: f"{len(self.images)} images"}
        if not self.goes_on:
            return save_image(sheet, self.folder, GRID_NAME, text)
        path = self.folder / f"{GRID_NAME}.png"
        with writing(path) as file:
            file.write(image_bytes(sheet, ".png", text))
        return path

    def rows(self) -> list[list[Path]]:
        """The images' files as the grid has them: a row for each prompt line, or a square."""
        lines: dict[int, list[Path]] = {}
        for drawn in self.images:
            lines.setdefault(drawn.line, []).append(drawn.path)
        if 1 < max(map(len, lines.values())) <= MOST_COLUMNS:
            return list(lines.values())
        paths = [drawn.path for drawn in self.images]
        columns = math.ceil(math.sqrt(len(paths)))
        return [paths[start : start + columns] for start in range(0, len(paths), columns)]

    def _page_path(self, goes_on: bool) -> Path:
        names = file_names(self.folder, REPORT_NAME, ".html")
        return next(path for path in names if goes_on or not path.exists())

    def _card(
        self, page: Path, path: Path, image: Image.Image, prompt: ImagePrompt, text: Mapping[str, str]
    ) -> dict[str, Any]:
        thumbnail = None
        if self._embedded < MOST_EMBEDDED:
            thumbnail = embedded_image(image, THUMBNAIL)
            self._embedded += len(thumbnail)
        link = link_from(page, path)
        return {
            "name": path.name,
            "image": thumbnail or link,
            "link": link,
            "size": [image.width, image.height],
            "prompt": prompt.prompt,
            "negative": text.get("negative-prompt", ""),
            "settings": {key: text[key] for key in SHOWN if key in text},
        }

    def _write_page(self) -> None:
        self._written = time.monotonic()
        if self.page is None:
            return
        lines: dict[int, list[Mapping[str, Any]]] = {}
        for drawn in sorted(self.images, key=lambda drawn: drawn.number):
            lines.setdefault(drawn.line, []).append(drawn.card)
        data = {"name": self.folder.name or str(self.folder), "lines": list(lines.values())}
        try:
            write_text(self.page, render_page("image_report.html", f"{data['name']}: images", data))
        except OSError as error:
            warn(f"--report: {self.page} cannot be written ({in_one_line(error)}).")


def contact_sheet(rows: Sequence[Sequence[Path]]) -> Image.Image:
    """One image of all image files, row by row, each in a cell of the same size; those that are gone leave it empty.

    Images are shrunk to at most ``LARGEST_CELL`` pixels, and so that no side is much longer than ``LARGEST_GRID``.
    """
    from PIL import Image

    columns = max(map(len, rows))
    sizes = [size for size in (_size(path) for row in rows for path in row) if size is not None]
    width = max((width for width, _ in sizes), default=1)
    height = max((height for _, height in sizes), default=1)
    shrunk = min(
        1.0, LARGEST_CELL / max(width, height), LARGEST_GRID / (width * columns), LARGEST_GRID / (height * len(rows))
    )
    width, height = max(1, round(width * shrunk)), max(1, round(height * shrunk))
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for y, row in enumerate(rows):
        for x, path in enumerate(row):
            try:
                small, _ = read_image(path)
            except UserError:
                continue
            small.thumbnail((width, height))
            left, top = (width - small.width) // 2, (height - small.height) // 2
            sheet.paste(small, (x * (width + GAP) + left, y * (height + GAP) + top))
    return sheet


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image file; None when it cannot be read."""
    try:
        with open_image(path) as image:
            return image.size
    except UserError:
        return None

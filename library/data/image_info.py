"""``metadata_cache.json``: image sizes and captions of a folder, kept for a quicker start (``cache_info``).

The file is kohya-ss/sd-scripts' format, {path: {"caption", "resolution"}}, with two keys per entry that tell how the
caption was read. An entry counts only while neither its image nor its caption file is newer than the cache, and the
options that shaped the caption are the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.captions import caption_file_names
from library.data.settings import SubsetSettings
from library.errors import UserError
from library.files import write_text
from library.text_files import parse_json, read_text

log = logging.getLogger(__name__)

FILE_NAME = "metadata_cache.json"
LARGEST_FILE = 1 << 31
"""Bytes; some hundred for each image."""


@dataclass(frozen=True)
class ImageInfo:
    """Size (width, height) and caption of one image."""

    size: tuple[int, int]
    caption: str


def read_image_info(subset: SubsetSettings, paths: Sequence[Path]) -> dict[str, ImageInfo]:
    """What is known and still true about the images ``paths``, by file name."""
    file = Path(subset.image_dir or "") / FILE_NAME
    try:
        written_at = file.stat().st_mtime_ns
        entries = parse_json(read_text(file, byte_limit=LARGEST_FILE), file)
        by_name = {Path(key).name: entry for key, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, UserError, AttributeError) as error:
        log.warning("%s cannot be used and is rebuilt (%s).", file, error)
        return {}
    known = {}
    for path in paths:
        info = _info(by_name.get(path.name), subset)
        if info is not None and not _changed_since(path, subset.caption_extension, written_at):
            known[path.name] = info
    return known


def write_image_info(subset: SubsetSettings, images: Sequence[tuple[Path, tuple[int, int], str]]) -> None:
    """Write (path, size, caption) of all images of the subset; a folder that cannot be written costs only time."""
    reading = {"caption_extension": subset.caption_extension, "enable_wildcard": subset.captions.enable_wildcard}
    entries = {str(path): {"caption": caption, "resolution": list(size), **reading} for path, size, caption in images}
    file = Path(subset.image_dir or "") / FILE_NAME
    try:
        write_text(file, json.dumps(entries, ensure_ascii=False, indent=2))
    except OSError as error:
        log.warning("%s cannot be written (%s); the next start looks at every image again.", file, error.strerror)


def _info(entry: Any, subset: SubsetSettings) -> ImageInfo | None:
    """The entry if it has the right form and was read with the same options (entries without them are accepted)."""
    if not isinstance(entry, dict):
        return None
    size, caption = entry.get("resolution"), entry.get("caption")
    if not isinstance(caption, str) or not isinstance(size, list) or len(size) != 2:
        return None
    if not all(isinstance(side, int) and side > 0 for side in size):
        return None
    if entry.get("caption_extension", subset.caption_extension) != subset.caption_extension:
        return None
    if entry.get("enable_wildcard", subset.captions.enable_wildcard) != subset.captions.enable_wildcard:
        return None
    return ImageInfo((size[0], size[1]), caption)


def _changed_since(path: Path, caption_extension: str, written_at: int) -> bool:
    names = [path.name, *caption_file_names(path.stem, caption_extension)]
    for name in names:
        try:
            if path.with_name(name).stat().st_mtime_ns >= written_at:
                return True
        except FileNotFoundError:
            continue
    return False

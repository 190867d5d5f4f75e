"""From a subset's folder or metadata file to its images with their captions."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.captions import CaptionFile, find_caption_file, read_caption
from library.data.image_info import ImageInfo, read_image_info
from library.data.images import (
    Listing,
    first_names,
    image_extensions,
    images_in,
    is_unread_image,
    list_folder,
    nested_images,
)
from library.data.settings import Kind, SubsetSettings
from library.data.threads import in_threads
from library.errors import UserError
from library.text_files import parse_json, read_text, shown

log = logging.getLogger(__name__)

Size = tuple[int, int]

SIZE_IN_NAME = re.compile(r"_(\d{4,})x(\d{4,})_[a-z0-9]+\.npz$")
NAMES_SHOWN = 100
METADATA_BYTES = 2**31
LARGEST_IMAGE_SIDE = 10**6


@dataclass
class ImageRecord:
    """One image of a subset, as its folder or metadata file describes it."""

    path: Path
    caption: str
    tags: str
    """The text whose tags count for the tag frequency of LoRA files."""
    size: Size | None = None
    """(width, height); None until the file was looked at."""
    conditioning: Path | None = None
    exists: bool = True
    """False when only a cache file of the image is left."""
    checked: bool = False
    """Whether an earlier start has looked at this very file (metadata_cache.json)."""


def read_subset(subset: SubsetSettings, kind: Kind, notes: list[str]) -> list[ImageRecord]:
    """The images of a subset in their fixed order (by path; metadata: longest key first).

    Lines worth telling the user are added to ``notes``. Raises UserError for missing folders, wrong metadata, captions
    that cannot be read, and conditioning images (masks or control images) that do not match.
    """
    records = _records_from_metadata(subset) if kind == "fine_tuning" else _records_from_folder(subset, notes)
    if subset.conditioning_data_dir:
        _match_conditioning(records, subset)
    return records


def shortened(names: Sequence[str]) -> list[str]:
    """Indented lines, one for each name, at most NAMES_SHOWN."""
    lines = [f"  {name}" for name in names[:NAMES_SHOWN]]
    return [*lines, f"  and {len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else lines


def _records_from_folder(subset: SubsetSettings, notes: list[str]) -> list[ImageRecord]:
    folder = subset.image_dir or ""
    listing = list_folder(folder, subset.place)
    paths = images_in(folder, listing.files)
    _note_unread_images(folder, listing, notes)
    if not paths:
        notes.append(f"{subset.place}: {folder} holds no images; it is left out.")
        return []
    known = read_image_info(subset, paths) if subset.cache_info else {}
    caption_files = [find_caption_file(path, subset.caption_extension, listing.files) for path in paths]
    captions = _captions(paths, caption_files, known, subset, notes)
    _note_missing_captions(paths, caption_files, listing.files, subset, notes)
    if not known:
        return [ImageRecord(path, caption, caption) for path, caption in zip(paths, captions)]
    return [
        ImageRecord(path, caption, caption, known[path.name].size, checked=True)
        if path.name in known
        else ImageRecord(path, caption, caption)
        for path, caption in zip(paths, captions)
    ]


def _note_unread_images(folder: str, listing: Listing, notes: list[str]) -> None:
    """Images that a user may expect to be trained, but which are not."""
    if unread := sorted(name for name in listing.files if is_unread_image(name)):
        known = ", ".join(sorted(extension for extension in image_extensions() if extension.islower()))
        notes.append(
            f"{folder}: {len(unread)} image{'s are' if len(unread) > 1 else ' is'} left out ({first_names(unread)}): "
            f"the extensions that are read are {known}, all in lower or all in upper case."
        )
    if nested := nested_images(folder, listing.subfolders):
        notes.append(
            f"{folder}: {len(nested)} image{'s' if len(nested) > 1 else ''} in folders below it "
            f"{'are' if len(nested) > 1 else 'is'} left out ({first_names(nested)}): name each folder in a subset of "
            "its own."
        )


def _captions(
    paths: list[Path],
    caption_files: list[str | None],
    known: dict[str, ImageInfo],
    subset: SubsetSettings,
    notes: list[str],
) -> list[str]:
    """The caption of each image: from its file, or else the class tokens, or else empty."""
    without_file = CaptionFile(subset.class_tokens or "")

    def read(path: Path, caption_file: str | None) -> CaptionFile | UserError:
        if caption_file is None:
            return without_file
        if known and path.name in known:
            return CaptionFile(known[path.name].caption)
        try:
            return read_caption(caption_file, enable_wildcard=subset.captions.enable_wildcard)
        except UserError as error:
            return error

    results = in_threads(read, paths, caption_files)
    if errors := [str(result) for result in results if isinstance(result, UserError)]:
        raise UserError("\n".join(errors))
    found = [result for result in results if isinstance(result, CaptionFile)]
    read_from = [(os.path.basename(file), caption) for file, caption in zip(caption_files, found) if file is not None]
    if blank := [name for name, caption in read_from if not caption.caption]:
        what = "nothing but blank lines" if subset.captions.enable_wildcard else "a blank first line"
        notes.append(
            f"{subset.image_dir}: {len(blank)} caption file{'s have' if len(blank) > 1 else ' has'} {what} "
            f"({first_names(blank)}): {_trained_with(subset)}."
        )
    separator = subset.captions.caption_separator
    if empty := [name for name, caption in read_from if caption.caption and not _words(caption.caption, separator)]:
        notes.append(
            f"{subset.image_dir}: {len(empty)} caption file{'s hold' if len(empty) > 1 else ' holds'} nothing but "
            f"separators ({first_names(empty)}): trained with those as the caption."
        )
    if several := [name for name, caption in read_from if caption.unused_lines]:
        notes.append(
            f"{subset.image_dir}: {len(several)} caption file{'s have' if len(several) > 1 else ' has'} more than one "
            f"line ({first_names(several)}): only the first is used, unless enable_wildcard is on."
        )
    return [caption.caption for caption in found]


def _trained_with(subset: SubsetSettings) -> str:
    """What images without a caption of their own are trained with, in words."""
    word = subset.captions.trigger_word
    return f'trained with the trigger word "{word}"' if word else "trained without a caption"


def _words(caption: str, separator: str) -> str:
    """What stands between the separators of a caption."""
    return caption.replace(separator, "").strip(" ,")


def _note_missing_captions(
    paths: list[Path], caption_files: list[str | None], names: set[str], subset: SubsetSettings, notes: list[str]
) -> None:
    missing = [path.name for path, file in zip(paths, caption_files) if file is None]
    if not missing:
        return
    instead = f'"{subset.class_tokens}" is used' if subset.class_tokens else f"they are {_trained_with(subset)}"
    if len(missing) < len(paths):
        count = f"{len(missing)} of {len(paths)} images have no {subset.caption_extension} file"
        notes.append("\n".join([f"{subset.image_dir}: {count}; {instead}:", *shortened(missing)]))
        return
    note = f"{subset.image_dir}: none of the {len(paths)} images has a {subset.caption_extension} file; {instead}."
    others = [ext for ext in (".txt", ".caption") if any(find_caption_file(path, ext, names) for path in paths)]
    if others:
        note += f' There are {others[0]} files: did you mean caption_extension = "{others[0]}"?'
    notes.append(note)


def _match_conditioning(records: list[ImageRecord], subset: SubsetSettings) -> None:
    """Give each image the conditioning image with its name; both folders must hold the same names."""
    folder = subset.conditioning_data_dir or ""
    by_stem = {path.stem: path for path in images_in(folder, list_folder(folder, subset.place).files)}
    for record in records:
        record.conditioning = by_stem.pop(record.path.stem, None)
    missing = [record.path.name for record in records if record.conditioning is None]
    problems = []
    if missing:
        problems += [f"{subset.place}: {len(missing)} images have no counterpart in {folder}:", *shortened(missing)]
    if by_stem:
        extra = sorted(path.name for path in by_stem.values())
        problems += [f"{subset.place}: {len(extra)} images in {folder} belong to no training image:", *shortened(extra)]
    if problems:
        raise UserError("\n".join(problems))


def _records_from_metadata(subset: SubsetSettings) -> list[ImageRecord]:
    path = Path(subset.metadata_file or "")
    entries = _read_metadata(path, subset.place)
    if not entries:
        raise UserError(f"{path}: there is no image in this metadata file.")
    folders: dict[str, set[str]] = {}
    records, missing = [], []
    for key in sorted(entries, key=len, reverse=True):
        record = _record_from_entry(key, entries[key], subset, folders)
        if record is None:
            missing.append(key)
        else:
            records.append(record)
    if missing:
        count = f"{len(missing)} of {len(entries)} images cannot be found (image_dir: {subset.image_dir}):"
        raise UserError("\n".join([f"{path}: {count}", *shortened(missing)]))
    return records


def _read_metadata(path: Path, place: str) -> dict[str, dict[str, Any]]:
    text = read_text(path, place, METADATA_BYTES)
    entries = _parse_json_lines(text, path) if path.suffix.lower() == ".jsonl" else _parse_json(text, path)
    for key, entry in entries.items():
        for name in ("caption", "tags"):
            if not isinstance(entry.get(name, ""), str | None):
                raise UserError(f'{path}: "{name}" of {key} must be a string.')
        size = entry.get("image_size")
        if size is not None and not _is_size(size):
            raise UserError(
                f'{path}: "image_size" of {key} must be [width, height], two integers from 1 to {LARGEST_IMAGE_SIDE}, '
                f"not {shown(size)}."
            )
    return entries


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int and 1 <= side <= LARGEST_IMAGE_SIDE for side in value)
    )


def _parse_json(text: str, path: Path) -> dict[str, dict[str, Any]]:
    data = parse_json(text, path)
    if not isinstance(data, dict) or not all(isinstance(entry, dict) for entry in data.values()):
        raise UserError(f'{path}: must be an object with an entry {{"caption": ..., "tags": ...}} for each image.')
    return data


def _parse_json_lines(text: str, path: Path) -> dict[str, dict[str, Any]]:
    entries = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        entry = parse_json(line, f"{path}, line {number}")
        if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
            raise UserError(f'{path}: line {number} must be an object with an "image_path".')
        entries[entry["image_path"]] = entry
    return entries


def _record_from_entry(
    key: str, entry: dict[str, Any], subset: SubsetSettings, folders: dict[str, set[str]]
) -> ImageRecord | None:
    """The image of one metadata entry, or None when there is neither an image nor a cache file of it."""
    if os.path.isabs(key):
        wanted = Path(key)
    elif subset.image_dir is None:
        raise UserError(
            f"{subset.place}: image_dir is missing, and {key} in {subset.metadata_file} is a relative path."
        )
    else:
        wanted = Path(os.path.join(subset.image_dir, key))
    folder = str(wanted.parent)
    if folder not in folders:
        folders[folder] = list_folder(folder, subset.place).files if wanted.parent.is_dir() else set()
    names = folders[folder]
    caption = _join_caption(entry.get("caption") or "", entry.get("tags") or "", subset)
    size = tuple(entry["image_size"]) if entry.get("image_size") else None
    if wanted.name not in names:
        with_extension = [wanted.name + extension for extension in sorted(image_extensions())]
        wanted = next((wanted.with_name(name) for name in with_extension if name in names), wanted)
    record = ImageRecord(wanted, caption, entry.get("tags") or "", size)
    if wanted.name not in names:
        record.exists = False
        record.size = size or _size_from_cache_files(wanted, names)
        if record.size is None:
            return None
    return record


def _size_from_cache_files(wanted: Path, names: set[str]) -> Size | None:
    """The size of an image of which only a latent cache file is left, from that file's name."""
    stem = wanted.stem if wanted.suffix in image_extensions() else wanted.name
    for name in sorted(names):
        if name.startswith(stem) and (match := SIZE_IN_NAME.search(name)) and name[: match.start()] == stem:
            return int(match[1]), int(match[2])
    return None


def _join_caption(caption: str, tags: str, subset: SubsetSettings) -> str:
    separator = subset.captions.caption_separator
    if subset.captions.enable_wildcard:
        tags = tags.replace("\n", separator)
        if not caption or not tags:
            return caption or tags
        return "\n".join(f"{line}{separator}{tags}" for line in caption.split("\n") if line.strip())
    if not tags:
        return caption
    return f"{caption}{separator}{tags}" if caption else tags

"""From settings to dataset groups: images found and checked, split for validation, repeated, put into buckets.

Everything that can be wrong with the data is reported here, before a model is loaded; torch is not needed.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Sequence
from dataclasses import replace

from library.data.buckets import (
    Placement,
    Size,
    bucket_resolutions,
    fill,
    place,
    place_without_upscaling,
    stepped_range,
)
from library.data.config import resolve_config
from library.data.dataset import Dataset, DatasetGroup, Item
from library.data.image_check import check_images
from library.data.image_info import write_image_info
from library.data.items import ImageRecord, read_subset, shortened
from library.data.options import CacheOptions, DatasetOptions
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.transforms import face_in_name
from library.errors import UserError
from library.prompt_options import TRIGGER

log = logging.getLogger(__name__)

LARGEST_RESIZED = 1 << 27
"""Pixels to which an image may be enlarged; a very narrow one would take all memory."""

# The images of one subset.
Records = list[ImageRecord]


def build_dataset_groups(
    options: DatasetOptions,
    *,
    bucket_divisor: int,
    size_divisor: int = 8,
    cache: CacheOptions | None = None,
    validation_split: float = 0.0,
    validation_seed: int | None = None,
    seed: int = 0,
    control_images: bool = False,
    read_only: bool = False,
) -> tuple[DatasetGroup, DatasetGroup | None]:
    """The training data and, if a split is configured, the validation data.

    The model family gives ``bucket_divisor`` (bucket_reso_steps must be a multiple of it) and ``size_divisor`` (a
    resolution without buckets must be). ``seed`` makes the split where no validation seed is given. With
    ``control_images`` the images of conditioning_data_dir are for a ControlNet, and every subset must have it. With
    ``read_only`` no metadata_cache.json is written. Raises UserError.
    """
    settings = resolve_config(
        options,
        validation_split=validation_split,
        validation_seed=validation_seed,
        control_images=control_images,
    )
    caching = cache is not None and (cache.cache_latents or cache.cache_latents_to_disk)
    settings = [_checked(entry, bucket_divisor, size_divisor, caching) for entry in settings]
    notes: list[str] = []
    records = _read_all(settings, notes, caching, read_only)
    train, validation = [], []
    for entry in settings:
        parts = [_split(subset, records[id(subset)], seed) for subset in entry.subsets]
        train.append(_dataset(entry, [part[0] for part in parts], caching, notes))
        if any(part[1] for part in parts):
            validation.append(_validation_dataset(entry, [part[1] for part in parts]))
    train = [dataset for dataset in train if dataset.samples]
    if not train:
        raise UserError(_no_images(settings, bool(validation)))
    group = DatasetGroup(train, notes=notes)
    return group, DatasetGroup(validation, shuffle=False) if validation else None


def _no_images(settings: Sequence[DatasetSettings], any_validation: bool) -> str:
    if not any(entry.subsets for entry in settings):
        return f"{settings[0].place}: every subset is left out; set num_repeats to at least 1."
    folders = [subset.image_dir or subset.metadata_file or "" for entry in settings for subset in entry.subsets]
    if any_validation:
        return "There are no training images: validation_split leaves all of them to validation."
    return f"There are no training images in {', '.join(dict.fromkeys(folders))}; check the folder names."


def _checked(settings: DatasetSettings, bucket_divisor: int, size_divisor: int, caching: bool) -> DatasetSettings:
    """The settings with bucket sides at multiples of the step. Raises UserError for what cannot work."""
    place_, (width, height) = settings.place, settings.resolution
    for subset in settings.subsets:
        _check_subset(subset, settings, caching)
    if not settings.enable_bucket:
        if width % size_divisor or height % size_divisor:
            raise UserError(f"{place_}: the resolution {width}x{height} must be a multiple of {size_divisor} pixels.")
        return settings
    step = settings.bucket_reso_steps
    if step % bucket_divisor:
        raise UserError(f"{place_}: bucket_reso_steps is {step}, but must be a multiple of {bucket_divisor}.")
    if step > min(width, height, settings.min_bucket_reso):
        raise UserError(f"{place_}: bucket_reso_steps ({step}) must not be larger than the smallest bucket side.")
    low, high = stepped_range(settings.min_bucket_reso, settings.max_bucket_reso, step)
    if (low, high) != (settings.min_bucket_reso, settings.max_bucket_reso):
        log.warning("%s: bucket sides are %d to %d, to be multiples of %d.", place_, low, high, step)
    if low > min(width, height):
        raise UserError(f"{place_}: min_bucket_reso ({low}) must not be larger than the resolution {width}x{height}.")
    if high < max(width, height) and settings.max_bucket_reso == DatasetSettings.max_bucket_reso:
        high = -(-max(width, height) // step) * step
        log.info("%s: max_bucket_reso is %d, so that the resolution %dx%d has a bucket.", place_, high, width, height)
    if high < max(width, height):
        raise UserError(f"{place_}: max_bucket_reso ({high}) must not be smaller than the resolution {width}x{height}.")
    return replace(settings, min_bucket_reso=low, max_bucket_reso=high)


def _check_subset(subset: SubsetSettings, settings: DatasetSettings, caching: bool) -> None:
    if not 0 <= subset.rotate_aug <= 45:
        raise UserError(f"{subset.place}: rotate_aug must be 0 to 45 degrees, not {subset.rotate_aug:g}.")
    for name in ("brightness_aug", "contrast_aug"):
        if not 0 <= getattr(subset, name) < 1:
            raise UserError(f"{subset.place}: {name} must be 0 or more and below 1, not {getattr(subset, name):g}.")
    if caching and subset.augmentations:
        option = subset.augmentations[0]
        raise UserError(
            f"{subset.place}: {option} cannot be used together with cached latents; switch one of them off."
        )
    if subset.face_crop_aug_range and (caching or settings.enable_bucket):
        reason = "cached latents" if caching else "buckets"
        log.warning("%s: face_crop_aug_range has no effect together with %s.", subset.place, reason)


def _read_all(
    settings: Sequence[DatasetSettings], notes: list[str], caching: bool, read_only: bool
) -> dict[int, Records]:
    """The images of every subset (by the identity of its settings), all with their sizes.

    Each file is looked at once, but for those that metadata_cache.json knows to be unchanged; files that cannot be read
    are listed all together.
    """
    subsets = [(subset, entry) for entry in settings for subset in entry.subsets]
    found = {id(subset): read_subset(subset, entry.kind, notes) for subset, entry in subsets}
    for subset, _ in subsets:
        _note_unnamed_triggers(subset, found[id(subset)], notes)
    records = [record for part in found.values() for record in part]
    conditioning = [record.conditioning for record in records if record.conditioning]
    check = check_images([record.path for record in records if record.exists and not record.checked], conditioning)
    notes += check.notes
    _compare_sizes(records, check.sizes, caching, notes)
    for record in records:
        record.size = record.size or check.sizes[record.path]
    _check_conditioning_shapes(records, check.sizes)
    for subset, _ in subsets:
        part = found[id(subset)]
        if subset.cache_info and not read_only and not all(record.checked for record in part):
            write_image_info(subset, [(record.path, _size(record), record.caption) for record in part])
    return found


def _note_unnamed_triggers(subset: SubsetSettings, records: Records, notes: list[str]) -> None:
    count = sum(TRIGGER in record.caption for record in records)
    if count and not subset.captions.trigger_word:
        notes.append(
            f"{subset.place}: {count} caption{'s contain' if count > 1 else ' contains'} {TRIGGER}, but there is no "
            "trigger_word for it to stand for: it is trained as it is written."
        )


def _compare_sizes(records: Records, sizes: dict, caching: bool, notes: list[str]) -> None:
    """Sizes given by metadata must be those of the files, or the images could not be trained.

    With cached latents this is only a note: an entry that is valid is used without looking at its image.
    """
    wrong = [
        f"{record.path}: {sizes[record.path][0]}x{sizes[record.path][1]}, not {record.size[0]}x{record.size[1]}"
        for record in records
        if record.size and sizes.get(record.path, record.size) != record.size
    ]
    if not wrong:
        return
    lines = [f"{len(wrong)} images have another size than the metadata says:", *shortened(wrong)]
    if not caching:
        raise UserError("\n".join(lines))
    notes.append("\n".join(lines))


def _size(record: ImageRecord) -> Size:
    assert record.size is not None
    return record.size


def _check_conditioning_shapes(records: Sequence[ImageRecord], sizes: dict) -> None:
    """A mask or control image may be smaller or larger than its image, but must have its shape to stay in place."""
    wrong = []
    for record in records:
        if record.conditioning is None:
            continue
        (width, height), mask = _size(record), sizes[record.conditioning]
        if abs(mask[0] * height - mask[1] * width) > max(width, height, *mask):
            wrong.append(f"{record.conditioning.name} is {mask[0]}x{mask[1]}, its image {width}x{height}")
    if wrong:
        told = "Images in conditioning_data_dir must have the aspect ratio of their images:"
        raise UserError("\n".join([told, *shortened(wrong)]))


def _split(subset: SubsetSettings, records: Records, seed: int) -> tuple[Records, Records]:
    """(training part, validation part): disjoint, together everything.

    The validation part is the last round(n * split) of the shuffled list, which with the same validation seed is what
    sd-scripts takes.
    """
    count = round(len(records) * subset.validation_split)
    if subset.is_reg or count == 0:
        return records, []
    shuffled = list(records)
    random.Random(seed if subset.validation_seed is None else subset.validation_seed).shuffle(shuffled)
    kept = {id(record) for record in shuffled[len(shuffled) - count :]}
    return [r for r in records if id(r) not in kept], [r for r in records if id(r) in kept]


def _validation_dataset(settings: DatasetSettings, parts: Sequence[Records]) -> Dataset:
    """The validation part: each image once, nothing random about it."""
    subsets = tuple(
        replace(
            subset,
            num_repeats=1,
            flip_aug=False,
            color_aug=False,
            rotate_aug=0.0,
            brightness_aug=0.0,
            contrast_aug=0.0,
            random_crop=False,
            captions=replace(
                subset.captions,
                shuffle_caption=False,
                token_warmup_step=0.0,
                caption_dropout_rate=0.0,
                caption_dropout_every_n_epochs=0,
                caption_tag_dropout_rate=0.0,
            ),
        )
        for subset in settings.subsets
    )
    return _dataset(replace(settings, subsets=subsets), parts, True, [])


def _dataset(settings: DatasetSettings, parts: Sequence[Records], caching: bool, notes: list[str]) -> Dataset:
    items: list[Item] = []
    problems: list[str] = []
    buckets = _bucket_list(settings)
    place_image = functools.cache(lambda size: _placement(size, settings, buckets))  # many images have the same size
    for subset, records in zip(settings.subsets, parts):
        for record in records:
            try:
                placement = place_image(_size(record))
            except UserError as error:
                problems.append(f"{record.path}: {error}")
                continue
            if not caching and (problem := _problem_without_cache(record, subset, settings)):
                problems.append(f"{record.path}: {problem}")
            items.append(_item(record, subset, placement))
    if problems:
        raise UserError("\n".join(problems))
    return _with_repeats(settings, items, notes)


def _item(record: ImageRecord, subset: SubsetSettings, placement: Placement) -> Item:
    return Item(
        path=record.path,
        caption=record.caption,
        tags=record.tags,
        size=_size(record),
        subset=subset,
        placement=placement,
        conditioning=record.conditioning,
        exists=record.exists,
    )


def _bucket_list(settings: DatasetSettings) -> list[Size]:
    if not settings.enable_bucket or settings.bucket_no_upscale:
        return [settings.resolution]
    sides = (settings.min_bucket_reso, settings.max_bucket_reso)
    return bucket_resolutions(settings.resolution, *sides, settings.bucket_reso_steps)


def _placement(size: Size, settings: DatasetSettings, buckets: list[Size]) -> Placement:
    if settings.enable_bucket and settings.bucket_no_upscale:
        return place_without_upscaling(size, settings.resolution, settings.bucket_reso_steps)
    if settings.enable_bucket:
        placement = place(size, buckets)
    else:
        placement = Placement(settings.resolution, fill(size, settings.resolution), 0.0)
    width, height = placement.resized
    if width * height > LARGEST_RESIZED:
        raise UserError(
            f"{size[0]}x{size[1]} pixels would be enlarged to {width}x{height} to fill "
            f"{placement.bucket[0]}x{placement.bucket[1]}; crop the image, or leave it out."
        )
    return placement


def _problem_without_cache(record: ImageRecord, subset: SubsetSettings, settings: DatasetSettings) -> str | None:
    """Why an image cannot be used when latents are not cached, or None."""
    if not record.exists:
        return "there is no such image, only a cache file of it; use --cache_latents_to_disk."
    if settings.enable_bucket:
        return None
    (width, height), target = _size(record), settings.resolution
    if width < target[0] or height < target[1]:
        return (
            f"{width}x{height} pixels is smaller than the resolution {target[0]}x{target[1]}; set enable_bucket = true."
        )
    larger = (width, height) != target
    face = subset.face_crop_aug_range and face_in_name(record.path.stem)
    if larger and not subset.random_crop and not face:
        return (
            f"{width}x{height} pixels is larger than the resolution {target[0]}x{target[1]}, and both buckets and "
            "cropping are off; set enable_bucket = true (or random_crop = true)."
        )
    return None


def _with_repeats(settings: DatasetSettings, items: Sequence[Item], notes: list[str]) -> Dataset:
    """Training images as often as their repeats say, then regularisation images in turn until there are as many."""
    train = [item for item in items if not item.subset.is_reg]
    reg = [item for item in items if item.subset.is_reg]
    wanted = sum(item.subset.num_repeats for item in train)
    counts = [0] * len(reg)
    total, first_round = 0, True
    while reg and total < wanted:
        for i, item in enumerate(reg):
            added = item.subset.num_repeats if first_round else 1
            counts[i] += added
            total += added
            if total >= wanted:
                break
        first_round = False
    unused = [str(item.path) for i, item in enumerate(reg) if counts[i] == 0]
    if unused:
        note = (
            f"{settings.place}: {len(unused)} regularisation images are not used: there are more than training images."
        )
        notes.append("\n".join([note, *shortened(unused)]))
    repeats = [item.subset.num_repeats for item in train] + list(counts)
    return Dataset(settings, train + reg, repeats)

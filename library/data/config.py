"""What a training run's data is: every dataset and subset with all its values decided.

Two sources lead here: a dataset configuration file, or folders named on the command line. A value is looked up in the
subset, its dataset, [general], the command line, in this order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from library.data.captions import CaptionRules
from library.data.config_file import (
    ConfigTables,
    DatasetTable,
    GeneralTable,
    SubsetTable,
    check_command_line,
    read_config_file,
)
from library.data.images import first_names, images_beside
from library.data.options import DatasetOptions
from library.data.settings import DatasetSettings, Kind, SubsetSettings
from library.data.unused_keys import KEY_OF_OPTION, say_unused_keys
from library.errors import UserError
from library.text_files import shown

log = logging.getLogger(__name__)

MOST_REPEATS = 1_000_000


def resolve_config(
    options: DatasetOptions,
    *,
    validation_split: float = 0.0,
    validation_seed: int | None = None,
    control_images: bool = False,
) -> list[DatasetSettings]:
    """Every dataset that the options describe.

    ``validation_split`` and ``validation_seed`` are the command line's values. With ``control_images`` the folders
    conditioning_data_dir hold a ControlNet's images, which every subset must have, and no masks. Nothing but
    configuration files and folder names is read. Raises UserError for anything that cannot be meant.
    """
    if options.dataset_class:
        raise UserError("--dataset_class: dataset classes of your own are not supported yet; use --dataset_config.")
    fallback = _command_line_values(options, validation_split, validation_seed)
    if options.dataset_config:
        for name in ("train_data_dir", "reg_data_dir", "in_json"):
            if getattr(options, name):
                log.warning("--%s has no effect: the datasets come from --dataset_config.", name)
        path = Path(options.dataset_config)
        tables, file = read_config_file(path), str(path)
    elif options.in_json or options.train_data_dir:
        tables, file = _tables_from_folders(options), "the command line"
    else:
        raise UserError("There is no training data: give --dataset_config or --train_data_dir.")
    if options.conditioning_data_dir:
        log.warning(
            "--conditioning_data_dir has no effect; give conditioning_data_dir in a subset of --dataset_config."
        )
    settings = [
        _dataset(tables.general, table, i, file, fallback, options, control_images)
        for i, table in enumerate(tables.datasets)
    ]
    if not settings:
        raise UserError(f"{file}: there is no [[datasets]] table; add one with a [[datasets.subsets]] in it.")
    if options.masked_loss:
        _say_where_masks_are(settings, control_images)
    say_unused_keys(settings, options, tables, fallback.asked)
    return settings


def _say_where_masks_are(settings: list[DatasetSettings], control_images: bool) -> None:
    """Of ``--masked_loss``."""
    subsets = [subset for entry in settings for subset in entry.subsets]
    masked = any(subset.alpha_mask for subset in subsets)
    if control_images:
        told = "--masked_loss: conditioning_data_dir holds the ControlNet's images, so that masks come from alpha_mask"
        log.info("%s.", told) if masked else log.warning("%s, which no subset has: nothing is masked.", told)
    elif not masked and not any(subset.conditioning_data_dir for subset in subsets):
        log.warning("--masked_loss has no effect: no subset has conditioning_data_dir or alpha_mask.")


class CommandLineValues(dict[str, Any]):
    """The command line as the last table of the look-up, under the names of the configuration file."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()
        """The keys that were looked up here because no table has them."""


def _command_line_values(options: DatasetOptions, split: float, seed: int | None) -> CommandLineValues:
    values = {key: getattr(options, key) for key in DatasetTable.model_fields if hasattr(options, key)}
    values["batch_size"] = options.train_batch_size
    values["num_repeats"] = options.dataset_repeats
    values["resolution"] = parse_resolution(options.resolution) if options.resolution else None
    values["face_crop_aug_range"] = _parse_range(options.face_crop_aug_range) if options.face_crop_aug_range else None
    values["caption_extension"] = options.caption_extention or options.caption_extension
    values["validation_split"] = split
    values["validation_seed"] = seed
    check_command_line(values, {key: option for option, key in KEY_OF_OPTION.items()})
    return CommandLineValues({**values, "prior_loss_weight": options.prior_loss_weight})


def parse_resolution(text: str) -> tuple[int, int]:
    """ "512" or "512,768" (width, height). Raises UserError."""
    parts = [part.strip() for part in str(text).split(",")]
    if len(parts) > 2 or not all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        raise UserError(f'--resolution must be "512" or "width,height", not "{text}".')
    return int(parts[0]), int(parts[-1])


def _parse_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 < low <= high:
        raise UserError(
            f'--face_crop_aug_range must be "low,high" with 0 < low <= high, such as "2.0,4.0", not "{text}".'
        )
    return low, high


def _tables_from_folders(options: DatasetOptions) -> ConfigTables:
    if options.in_json:
        subsets = [SubsetTable(image_dir=options.train_data_dir, metadata_file=options.in_json)]
    else:
        subsets = _subsets_of_folder(options.train_data_dir, "--train_data_dir", is_reg=False)
        if not subsets:
            raise UserError(
                f"--train_data_dir: no sub-folder of {options.train_data_dir} is named like 10_name (repeats, then the "
                "class); give the folder that contains such folders, or use --dataset_config."
            )
        if options.reg_data_dir:
            subsets += _subsets_of_folder(options.reg_data_dir, "--reg_data_dir", is_reg=True)
    return ConfigTables(datasets=[DatasetTable(subsets=subsets)])


def _subsets_of_folder(folder: str | None, option: str, *, is_reg: bool) -> list[SubsetTable]:
    """A subset for each sub-folder ``N_class``, sorted by name."""
    parent = Path(folder or "")
    if not parent.is_dir():
        raise UserError(f"{option}: there is no folder {parent}.")
    subsets = []
    for path in sorted(entry for entry in parent.iterdir() if entry.is_dir()):
        number, _, class_tokens = path.name.encode("utf-8", "replace").decode("utf-8").partition("_")
        try:
            repeats = int(number)
        except ValueError:
            log.warning(
                "%s: the folder %s is left out: its name does not begin with a number of repeats.", option, path.name
            )
            continue
        if repeats >= 1:
            subsets.append(
                SubsetTable(image_dir=str(path), class_tokens=class_tokens, num_repeats=repeats, is_reg=is_reg)
            )
    if subsets and (loose := images_beside(str(parent))):
        log.warning(
            "%s: %d image%s directly in %s %s left out (%s): only its folders with names like 10_name are used.",
            *(option, len(loose), "s" if len(loose) > 1 else "", parent, "are" if len(loose) > 1 else "is"),
            first_names(loose),
        )
    return subsets


def _dataset(
    general: GeneralTable,
    table: DatasetTable,
    index: int,
    file: str,
    fallback: CommandLineValues,
    options: DatasetOptions,
    control_images: bool,
) -> DatasetSettings:
    place = f"{file}: [[datasets]] number {index + 1}" if options.dataset_config else file
    kind = _kind(table, place, options, control_images)

    def value(key: str) -> Any:
        return _look_up(key, fallback, table, general)

    resolution, prior_loss_weight = value("resolution"), value("prior_loss_weight")
    if resolution is None:
        raise UserError(f"{place}: the resolution is missing; set it there, in [general] or with --resolution.")
    settings = DatasetSettings(
        place=place,
        kind=kind,
        subsets=_subsets(general, table, place, kind, fallback, options),
        resolution=(resolution[0], resolution[1]),
        batch_size=value("batch_size"),
        enable_bucket=value("enable_bucket"),
        min_bucket_reso=value("min_bucket_reso"),
        max_bucket_reso=value("max_bucket_reso"),
        bucket_reso_steps=value("bucket_reso_steps"),
        bucket_no_upscale=value("bucket_no_upscale"),
        network_multiplier=1.0 if value("network_multiplier") is None else float(value("network_multiplier")),
        resize_interpolation=value("resize_interpolation"),
        prior_loss_weight=prior_loss_weight if kind == "dreambooth" else 1.0,
    )
    return settings


def _look_up(key: str, fallback: CommandLineValues, *tables: Any) -> Any:
    for table in tables:
        found = getattr(table, key, None)
        if found is not None:
            return found
    fallback.asked.add(key)
    return fallback.get(key)


def _kind(table: DatasetTable, place: str, options: DatasetOptions, control_images: bool) -> Kind:
    if not table.subsets:
        raise UserError(f"{place}: there is no [[datasets.subsets]] table; add one with an image_dir.")
    with_metadata = [subset.metadata_file is not None for subset in table.subsets]
    with_conditioning = [subset.conditioning_data_dir is not None for subset in table.subsets]
    if control_images:
        _require_control_images(with_conditioning, place, options)
        with_conditioning = [False] * len(with_conditioning)  # they make no kind of their own
    if any(with_conditioning) and not options.masked_loss:
        raise UserError(
            f"{place}: conditioning_data_dir needs --masked_loss (its images are masks for the loss) or a ControlNet "
            "(they are its control images)."
        )
    if any(with_metadata) and any(with_conditioning):
        raise UserError(
            f"{place}: subsets with metadata_file and with conditioning_data_dir cannot be mixed; use two [[datasets]]."
        )
    for flags, key in ((with_metadata, "metadata_file"), (with_conditioning, "conditioning_data_dir")):
        if any(flags) and not all(flags):
            raise UserError(f"{place}: subsets with and without {key} cannot be mixed; put them in two [[datasets]].")
    if all(with_metadata):
        return "fine_tuning"
    return "conditioning" if all(with_conditioning) else "dreambooth"


def _require_control_images(given: list[bool], place: str, options: DatasetOptions) -> None:
    if all(given):
        return
    if options.dataset_config:
        number = given.index(False) + 1
        raise UserError(
            f"{place}, [[datasets.subsets]] number {number}: conditioning_data_dir is missing; with a ControlNet every "
            "subset names the folder of its control images."
        )
    raise UserError(
        f"{place}: a ControlNet needs a control image for every image; use --dataset_config with conditioning_data_dir "
        "in every subset."
    )


KEYS_WITHOUT_EFFECT: dict[Kind, tuple[str, ...]] = {
    "dreambooth": (),
    "fine_tuning": ("is_reg", "class_tokens", "caption_extension", "cache_info"),
    "conditioning": ("is_reg", "class_tokens", "alpha_mask"),
}


def _subsets(
    general: GeneralTable,
    table: DatasetTable,
    place: str,
    kind: Kind,
    fallback: CommandLineValues,
    options: DatasetOptions,
) -> tuple[SubsetSettings, ...]:
    """The subsets to use; repeated ones and those with no repeats are left out with a warning."""
    kept: dict[tuple[str | None, ...], SubsetSettings] = {}
    for i, subset in enumerate(table.subsets):
        where = (
            f"{place}, [[datasets.subsets]] number {i + 1}"
            if options.dataset_config
            else f"{place}: {subset.image_dir}"
        )
        settings = _subset(general, table, subset, where, kind, fallback)
        if settings.num_repeats < 1:
            log.warning("%s is left out: num_repeats is %d.", where, settings.num_repeats)
        elif settings.num_repeats > MOST_REPEATS:
            raise UserError(f"{where}: num_repeats must be at most {MOST_REPEATS:,}, not {settings.num_repeats:,}.")
        elif settings.identity in kept:
            log.warning(
                "%s is left out: %s is in this dataset already.", where, settings.metadata_file or settings.image_dir
            )
        else:
            kept[settings.identity] = settings
    return tuple(kept.values())


def _caption_rules(
    value: Callable[[str], Any], tables: tuple[SubsetTable, DatasetTable, GeneralTable], place: str
) -> CaptionRules:
    """The caption options of a subset; regularisation images have a trigger word only if their own table gives one."""
    table = tables[0]
    values = {name: value(name) for name in CaptionRules.__dataclass_fields__}
    if table.is_reg and table.trigger_word is None:
        values["trigger_word"] = None
    word, separator = (values["trigger_word"] or "").strip(), values["caption_separator"]
    if separator in word or "\n" in word:
        is_in_file = any(each.trigger_word is not None for each in tables)
        name = f"{place}: trigger_word" if is_in_file else "--trigger_word"
        raise UserError(
            f'{name} must be one tag, without a line end or the caption separator "{separator}", not {shown(word)}.'
        )
    return CaptionRules(**{**values, "trigger_word": word or None})


def _subset(
    general: GeneralTable,
    dataset: DatasetTable,
    table: SubsetTable,
    place: str,
    kind: Kind,
    fallback: CommandLineValues,
) -> SubsetSettings:
    for key in KEYS_WITHOUT_EFFECT[kind]:
        if getattr(table, key) is not None:
            reason = "metadata_file" if kind == "fine_tuning" else "conditioning_data_dir"
            raise UserError(f'{place}, "{key}" cannot be used together with {reason}.')
    if kind != "fine_tuning" and table.image_dir is None:
        raise UserError(f"{place}: image_dir is missing.")

    tables = (table, dataset, general)

    def value(key: str) -> Any:
        return _look_up(key, fallback, *tables)

    face_range, random_crop = value("face_crop_aug_range"), value("random_crop")
    if kind == "conditioning" and random_crop:
        raise UserError(f"{place}: random_crop cannot be used together with conditioning_data_dir.")
    extension = value("caption_extension")
    return SubsetSettings(
        place=place,
        image_dir=table.image_dir,
        metadata_file=table.metadata_file,
        conditioning_data_dir=table.conditioning_data_dir,
        is_reg=bool(table.is_reg),
        class_tokens=value("class_tokens") if kind == "dreambooth" else None,
        num_repeats=value("num_repeats"),
        caption_extension=extension if extension.startswith(".") else f".{extension}",
        captions=_caption_rules(value, tables, place),
        cache_info=value("cache_info") and kind != "fine_tuning",
        color_aug=value("color_aug"),
        rotate_aug=value("rotate_aug"),
        brightness_aug=value("brightness_aug"),
        contrast_aug=value("contrast_aug"),
        flip_aug=value("flip_aug"),
        random_crop=random_crop,
        face_crop_aug_range=(face_range[0], face_range[1]) if face_range else None,
        alpha_mask=value("alpha_mask") and kind != "conditioning",
        resize_interpolation=value("resize_interpolation"),
        validation_split=float(value("validation_split")),
        validation_seed=value("validation_seed"),
        custom_attributes=value("custom_attributes") or {},
    )

"""Dataset configuration files (.toml, .json): read, checked against typed tables, refused with clear sentences."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from library.errors import UserError, did_you_mean
from library.text_files import BACKSLASH_HINT, parse_json, parse_toml, read_text, shown

INTERPOLATIONS = ("bicubic", "cubic", "bilinear", "linear", "lanczos", "lanczos4", "nearest", "area", "box")
LARGEST_SIDE = 65536
"""Pixels; far more than is ever trained, and still few enough for the list of buckets."""
LARGEST_MULTIPLIER = 1000
COMMAND_LINE_ONLY = ("prior_loss_weight", "debug_dataset", "max_token_length", "masked_loss", "vae_batch_size")


def _resolution(value: Any) -> Any:
    if _is_integer(value):
        value = [value, value]
    if isinstance(value, list) and len(value) == 2 and all(_is_integer(side) and side > 0 for side in value):
        if max(value) > LARGEST_SIDE:
            raise ValueError(f"must be at most {LARGEST_SIDE} pixels")
        return value
    raise ValueError("must be a positive integer or [width, height]")


def _range_of_two(value: Any) -> Any:
    numbers = isinstance(value, list) and len(value) == 2 and all(_is_number(bound) for bound in value)
    if numbers and 0 < value[0] <= value[1]:
        return [float(bound) for bound in value]
    raise ValueError("must be [low, high] with 0 < low <= high")


def _multiplier(value: Any) -> Any:
    if _is_number(value) and (value == 0 or abs(value) > LARGEST_MULTIPLIER):
        raise ValueError(
            f"must be a number from {-LARGEST_MULTIPLIER} to {LARGEST_MULTIPLIER} other than 0, with which nothing is "
            "trained"
        )
    return value


def _path(value: Any) -> Any:
    """A path; "C:\\new" in TOML's double quotes has a line end in the place of the back-slash."""
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ValueError("must be a path, without a zero byte")
    if any(mark in value for mark in "\b\t\n\f\r") and not os.path.exists(value):
        raise ValueError(f"must be a path, without control characters. {BACKSLASH_HINT.removesuffix('.')}; the path is")
    return value


def _interpolation(value: Any) -> Any:
    if value in INTERPOLATIONS:
        return value
    raise ValueError(f"must be one of {', '.join(INTERPOLATIONS)}")


def _not_empty(value: Any) -> Any:
    if value == "":
        raise ValueError("must not be empty")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _given(check: Callable[[Any], Any]) -> BeforeValidator:
    """None means "not given" everywhere (JSON's null)."""
    return BeforeValidator(lambda value: None if value is None else check(value))


Rate = Annotated[float | None, Field(ge=0, le=1)]
Count = Annotated[int | None, Field(ge=0, le=2**31 - 1)]
BatchSize = Annotated[int | None, Field(ge=1, le=65536)]
Side = Annotated[int | None, Field(ge=1, le=LARGEST_SIDE)]
FilePath = Annotated[str | None, _given(_path)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class SubsetKeys(_Table):
    """Keys allowed in [general], [[datasets]] and [[datasets.subsets]]; None means not given."""

    num_repeats: int | None = None
    shuffle_caption: bool | None = None
    caption_separator: Annotated[str | None, _given(_not_empty)] = None
    keep_tokens: Count = None
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool | None = None
    trigger_word: str | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    color_aug: bool | None = None
    rotate_aug: float | None = None
    brightness_aug: float | None = None
    contrast_aug: float | None = None
    flip_aug: bool | None = None
    random_crop: bool | None = None
    face_crop_aug_range: Annotated[list[float] | None, _given(_range_of_two)] = None
    token_warmup_min: Count = None
    token_warmup_step: Annotated[float | None, Field(ge=0)] = None
    custom_attributes: dict[str, Any] | None = None
    resize_interpolation: Annotated[str | None, _given(_interpolation)] = None
    caption_dropout_rate: Rate = None
    caption_tag_dropout_rate: Rate = None
    caption_dropout_every_n_epochs: Count = None
    caption_extension: str | None = None
    cache_info: bool | None = None
    class_tokens: str | None = None
    alpha_mask: bool | None = None
    validation_split: Rate = None
    validation_seed: int | None = None


class GeneralTable(SubsetKeys):
    """[general], and keys at the root of the file."""

    resolution: Annotated[list[int] | None, _given(_resolution)] = None
    batch_size: BatchSize = None
    enable_bucket: bool | None = None
    min_bucket_reso: Side = None
    max_bucket_reso: Side = None
    bucket_reso_steps: Side = None
    bucket_no_upscale: bool | None = None
    network_multiplier: Annotated[float | None, _given(_multiplier)] = None


class SubsetTable(SubsetKeys):
    """[[datasets.subsets]]"""

    image_dir: FilePath = None
    is_reg: bool | None = None
    metadata_file: FilePath = None
    conditioning_data_dir: FilePath = None


class DatasetTable(GeneralTable):
    """[[datasets]]"""

    subsets: list[SubsetTable] = Field(default_factory=list)


class ConfigTables(_Table):
    """A whole dataset configuration."""

    general: GeneralTable = Field(default_factory=GeneralTable)
    datasets: list[DatasetTable]


def read_config_file(path: Path) -> ConfigTables:
    """Read and check a dataset configuration.

    Raises UserError for a missing file, another extension, a syntax error (with its line), an unknown key (with the
    nearest known one), a wrong type or value.
    """
    raw = _parse(path)
    root_keys = set(raw)
    raw = _move_root_keys_into_general(raw, path)
    for table, where in _tables_of(raw):
        _join_interpolation_names(table, f"{path}: {where}")
    try:
        return ConfigTables.model_validate(raw)
    except ValidationError as error:
        sentences = list(dict.fromkeys(_sentence(detail, path, root_keys) for detail in error.errors()))
        raise UserError("\n".join(sentences)) from None


def check_command_line(values: Mapping[str, Any], options: Mapping[str, str]) -> None:
    """Hold the values of the command line to the same limits as the keys of [[datasets]].

    ``values`` are by key, ``options`` maps a key to its option where the names differ. Raises UserError.
    """
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    try:
        DatasetTable.model_validate(given)
    except ValidationError as error:
        sentences = [f"--{options.get(str(d['loc'][0]), d['loc'][0])} {_demand(d)}." for d in error.errors()]
        raise UserError("\n".join(sentences)) from None


def _parse(path: Path) -> dict[str, Any]:
    extension = path.suffix.lower()
    if extension not in (".toml", ".json"):
        raise UserError(f"--dataset_config: {path} is neither a .toml nor a .json file.")
    text = read_text(path, "--dataset_config")
    raw = parse_toml(text, path) if extension == ".toml" else parse_json(text, path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: the file must hold one object with the keys general and datasets.")
    return raw


def _move_root_keys_into_general(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Keys at the root count as [general]; a key in both places must have one value."""
    general = raw.get("general", {})
    if not isinstance(general, dict):
        return raw
    root = {key: value for key, value in raw.items() if key not in ("general", "datasets")}
    for key in root:
        if key in general and general[key] != root[key]:
            raise UserError(f"{path}: {key} has one value at the root and another in [general]; keep one of them.")
    moved: dict[str, Any] = {"general": {**root, **general}}
    if "datasets" in raw:
        moved["datasets"] = raw["datasets"]
    return moved


def _tables_of(raw: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every table of the file with its place, as far as the structure is the right one."""
    tables = [(raw["general"], "in [general]")] if isinstance(raw["general"], dict) else []
    datasets = raw.get("datasets")
    for i, dataset in enumerate(datasets if isinstance(datasets, list) else []):
        if not isinstance(dataset, dict):
            continue
        tables.append((dataset, _place(("datasets", i))))
        subsets = dataset.get("subsets")
        for j, subset in enumerate(subsets if isinstance(subsets, list) else []):
            if isinstance(subset, dict):
                tables.append((subset, _place(("datasets", i, "subsets", j))))
    return tables


def _join_interpolation_names(table: dict[str, Any], where: str) -> None:
    """``interpolation_type`` is another name of ``resize_interpolation``."""
    if "interpolation_type" not in table:
        return
    value = table.pop("interpolation_type")
    if table.setdefault("resize_interpolation", value) != value:
        raise UserError(f"{where}, interpolation_type and resize_interpolation differ; they are the same option.")


def _place(location: tuple[int | str, ...]) -> str:
    """('datasets', 0, 'subsets', 1) as words."""
    if location[:1] == ("datasets",) and len(location) >= 2:
        words = f"in [[datasets]] number {int(location[1]) + 1}"
        if location[2:3] == ("subsets",) and len(location) >= 4:
            words += f", [[datasets.subsets]] number {int(location[3]) + 1}"
        return words
    if location[:1] == ("general",):
        return "in [general]"
    return "at the root"


def _sentence(detail: Any, path: Path, root_keys: set[str]) -> str:
    """One pydantic error as a sentence with file, table and key."""
    location = tuple(part for part in detail["loc"] if not str(part).startswith(("function-", "list[")))
    depth = {"general": 1, "datasets": 4 if location[2:3] == ("subsets",) and len(location) > 4 else 2}
    table = location[: depth.get(str(location[0]), 0)] if len(location) > 1 else ()
    key = str(location[len(table)]) if len(location) > len(table) else str(location[-1])
    at_root = table == ("general",) and key in root_keys
    where = f"{path}: {_place(() if at_root else table)}"
    if detail["type"] == "extra_forbidden":
        return f'{where}, "{key}" is not a known key.{_advice(key, table)}'
    if detail["type"] == "missing" and key == "datasets":
        return f"{path}: there is no [[datasets]] table; add one with a [[datasets.subsets]] that names an image_dir."
    return f'{where}, "{key}" {_demand(detail)}.'


def _advice(key: str, table: tuple[int | str, ...]) -> str:
    in_subset = len(table) == 4
    if in_subset and key in GeneralTable.model_fields:
        return " It belongs in [[datasets]] or [general]."
    if not in_subset and key in SubsetTable.model_fields:
        return " It belongs in [[datasets.subsets]]."
    if key in COMMAND_LINE_ONLY:
        return f" It is a command line option: --{key}."
    known = SubsetTable if in_subset else DatasetTable if table[:1] == ("datasets",) else GeneralTable
    return did_you_mean(key, [*known.model_fields, "interpolation_type"])


def _demand(detail: Any) -> str:
    """What the value should have been, and what it is."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return f"{context['error']}, not {shown(detail['input'])}"
    wanted = {
        "int_type": "an integer",
        "int_from_float": "an integer",
        "int_parsing_size": "a smaller integer",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a string",
        "list_type": "a list of tables",
        "dict_type": "a table",
        "model_type": "a table",
        "greater_than_equal": f"at least {context.get('ge', 0):g}",
        "less_than_equal": f"at most {context.get('le', 0):.12g}",
    }.get(kind)
    given = shown(detail["input"])
    return f"must be {wanted}, not {given}" if wanted else f"{detail['msg']}, not {given}"

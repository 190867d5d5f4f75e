"""Dataset settings that change nothing beside the others that were given, so that none is ignored in silence."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from library.data.config_file import ConfigTables
from library.data.options import DatasetOptions
from library.data.settings import DatasetSettings

log = logging.getLogger(__name__)

KEY_OF_OPTION = {
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "caption_extention": "caption_extension",
}
"""Options of the command line whose key in a dataset configuration has another name."""
Rule = tuple[bool, str, Sequence[str]]
"""Whether the keys (third) are without effect, and the reason."""


def unused_keys(settings: Sequence[DatasetSettings]) -> list[tuple[str, Sequence[str]]]:
    """Reasons and keys that would change nothing in any of these datasets, whether they are given or not."""
    rules = (*_about_buckets(settings), *_about_captions(settings), *_about_kinds(settings))
    return [(reason, keys) for holds, reason, keys in rules if holds]


def _about_buckets(settings: Sequence[DatasetSettings]) -> Iterator[Rule]:
    bucketed = [entry for entry in settings if entry.enable_bucket]
    sides = ["min_bucket_reso", "max_bucket_reso"]
    yield not bucketed, "without enable_bucket", [*sides, "bucket_reso_steps", "bucket_no_upscale"]
    only_smaller = bool(bucketed) and all(entry.bucket_no_upscale for entry in bucketed)
    yield only_smaller, "with bucket_no_upscale", sides


def _about_captions(settings: Sequence[DatasetSettings]) -> Iterator[Rule]:
    rules = [subset.captions for entry in settings for subset in entry.subsets]
    grows = any(rule.token_warmup_step > 0 for rule in rules)
    varies = grows or any(rule.shuffle_caption or rule.caption_tag_dropout_rate > 0 for rule in rules)
    joins = any(rule.secondary_separator or rule.trigger_word for rule in rules)
    joins = joins or any(entry.kind == "fine_tuning" for entry in settings)
    keys = ["keep_tokens", "keep_tokens_separator"] + ([] if joins else ["caption_separator"])
    yield not varies, "without shuffle_caption, token_warmup_step or caption_tag_dropout_rate", keys
    yield not grows, "without token_warmup_step", ["token_warmup_min"]


def _about_kinds(settings: Sequence[DatasetSettings]) -> Iterator[Rule]:
    kinds = {entry.kind for entry in settings}
    subsets = [subset for entry in settings for subset in entry.subsets]
    yield kinds == {"fine_tuning"}, "with metadata_file", ["caption_extension", "cache_info"]
    yield kinds == {"conditioning"}, "with conditioning_data_dir", ["alpha_mask"]
    yield "dreambooth" not in kinds, "with metadata_file or conditioning_data_dir", ["class_tokens"]
    yield not any(subset.is_reg for subset in subsets), "without regularisation images", ["prior_loss_weight"]
    yield not any(subset.validation_split for subset in subsets), "without validation_split", ["validation_seed"]


def say_unused_keys(
    settings: Sequence[DatasetSettings], options: DatasetOptions, tables: ConfigTables, asked: Collection[str]
) -> None:
    """A line for each reason why something given has no effect.

    ``asked`` holds the keys for which some dataset had no value of its own.
    """
    from_command_line = _given_options(options)
    in_tables = _given_keys(tables) if options.dataset_config else set()
    for reason, keys in unused_keys(settings):
        named = {key: [f"--{name}" for name, other in from_command_line.items() if other == key] for key in keys}
        _say(reason, [name for key in keys for name in named[key] + ([key] if key in in_tables else [])])
    overruled = [f"--{name}" for name, key in from_command_line.items() if key not in asked]
    source = f"values of {options.dataset_config}" if options.dataset_config else "names of the folders"
    _say(f"beside the {source}", overruled)
    if options.caption_extention:
        _say("beside --caption_extention", ["--caption_extension"] if "caption_extension" in from_command_line else [])
    if options.in_json and options.reg_data_dir and not options.dataset_config:
        _say("beside --in_json", ["--reg_data_dir"])


def _say(reason: str, names: Sequence[str]) -> None:
    if names:
        log.info("no effect %s: %s", reason, ", ".join(names))


def _given_options(options: DatasetOptions) -> dict[str, str]:
    """Options of the command line that differ from their defaults and have a key in dataset configurations."""
    from library.data.config_file import DatasetTable

    defaults = DatasetOptions()
    given = {
        name: KEY_OF_OPTION.get(name, name) for name, value in vars(options).items() if value != getattr(defaults, name)
    }
    keys = {*DatasetTable.model_fields, "prior_loss_weight"}
    return {name: key for name, key in given.items() if key in keys}


def _given_keys(tables: ConfigTables) -> set[str]:
    """Every key that stands somewhere in the configuration with a value."""
    parts: list[Any] = [tables.general, *tables.datasets, *(subset for t in tables.datasets for subset in t.subsets)]
    return {key for part in parts for key in part.model_fields_set if getattr(part, key) is not None}

"""What a LoRA file says about the data it was trained on (the ``ss_*`` keys of kohya-ss/sd-scripts)."""

from __future__ import annotations

import json
from typing import Any

from library.data.captions import count_tags, put_trigger_word
from library.data.dataset import Dataset, DatasetGroup
from library.data.options import DatasetOptions
from library.data.settings import SubsetSettings
from library.prompt_options import name_trigger


def dataset_metadata(group: DatasetGroup, options: DatasetOptions, *, world_size: int = 1) -> dict[str, Any]:
    """The metadata about datasets; which keys there are depends on where the datasets were described.

    Values are as they are printed into the file with ``str`` (dictionaries are JSON text already).
    """
    trigger = {"ss_trigger_word": trigger_phrase(group)} if group.trigger_words else {}
    if options.dataset_config:
        return {
            **trigger,
            "ss_datasets": json.dumps([_describe_dataset(dataset) for dataset in group.datasets]),
            "ss_tag_frequency": json.dumps(_merged_tag_frequency(group)),
            "ss_dataset_dirs": json.dumps(_dataset_dirs(group)),
        }
    dataset = group.datasets[0]
    dirs = {subset.folder_name: _counts(dataset, subset) for subset in dataset.settings.subsets if not subset.is_reg}
    reg = {subset.folder_name: _counts(dataset, subset) for subset in dataset.settings.subsets if subset.is_reg}
    return {
        **trigger,
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_total_batch_size": options.train_batch_size * world_size,
        "ss_resolution": dataset.settings.resolution,
        "ss_color_aug": options.color_aug,
        "ss_flip_aug": options.flip_aug,
        "ss_random_crop": options.random_crop,
        "ss_shuffle_caption": options.shuffle_caption,
        "ss_enable_bucket": dataset.settings.enable_bucket,
        "ss_bucket_no_upscale": dataset.settings.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.settings.min_bucket_reso,
        "ss_max_bucket_reso": dataset.settings.max_bucket_reso,
        "ss_keep_tokens": options.keep_tokens,
        "ss_dataset_dirs": json.dumps(dirs),
        "ss_reg_dataset_dirs": json.dumps(reg),
        "ss_tag_frequency": json.dumps(tag_frequency(dataset)),
        "ss_bucket_info": json.dumps(bucket_info(dataset)),
    }


def trigger_phrase(group: DatasetGroup) -> str | None:
    """The trigger words of the data, separated by commas; None if there are none."""
    return ", ".join(group.trigger_words) or None


def tag_frequency(dataset: Dataset) -> dict[str, dict[str, int]]:
    """{folder or metadata file: {tag: count}}; each image counts once, whatever its repeats.

    A trigger word counts where it is trained.
    """
    found: dict[str, dict[str, int]] = {}
    for subset in dataset.settings.subsets:
        word = subset.captions.trigger_word
        tags = [name_trigger(item.tags, word) for item in dataset.subset_items(subset)]
        counts = count_tags([put_trigger_word(text, word) for text in tags])
        folder = found.setdefault(subset.folder_name, {})
        for tag, count in counts.items():
            folder[tag] = folder.get(tag, 0) + count
    return {folder: counts for folder, counts in found.items() if counts}


def bucket_info(dataset: Dataset) -> dict[str, Any] | None:
    """Resolution and sample count of each bucket in use, and the mean aspect error; None without buckets."""
    if not dataset.settings.enable_bucket:
        return None
    buckets = dataset.bucket_samples()
    errors = [abs(dataset.items[item].placement.aspect_error) for item in dataset.samples]
    return {
        "buckets": {
            index: {"resolution": list(size), "count": len(samples)}
            for index, (size, samples) in enumerate(buckets.items())
        },
        "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0,
    }


def _describe_dataset(dataset: Dataset) -> dict[str, Any]:
    settings = dataset.settings
    return {
        "is_dreambooth": settings.kind == "dreambooth",
        "batch_size_per_device": settings.batch_size,
        "num_train_images": dataset.train_image_count,
        "num_reg_images": dataset.reg_image_count,
        "resolution": list(settings.resolution),
        "enable_bucket": settings.enable_bucket,
        "min_bucket_reso": settings.min_bucket_reso,
        "max_bucket_reso": settings.max_bucket_reso,
        "tag_frequency": tag_frequency(dataset),
        "bucket_info": bucket_info(dataset),
        "resize_interpolation": settings.resize_interpolation,
        "subsets": [_describe_subset(dataset, subset) for subset in settings.subsets],
    }


def _describe_subset(dataset: Dataset, subset: SubsetSettings) -> dict[str, Any]:
    varied = ("rotate_aug", "brightness_aug", "contrast_aug")  # other programs have none of them
    described: dict[str, Any] = {
        **{name: getattr(subset, name) for name in varied if getattr(subset, name)},
        **({"trigger_word": word} if (word := subset.captions.trigger_word) else {}),
        "img_count": len(dataset.subset_items(subset)),
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.captions.shuffle_caption,
        "keep_tokens": subset.captions.keep_tokens,
        "keep_tokens_separator": subset.captions.keep_tokens_separator,
        "secondary_separator": subset.captions.secondary_separator,
        "enable_wildcard": subset.captions.enable_wildcard,
        "caption_prefix": subset.captions.caption_prefix,
        "caption_suffix": subset.captions.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
    }
    if subset.image_dir:
        described["image_dir"] = _base_name(subset.image_dir)
    if subset.metadata_file:
        described["metadata_file"] = _base_name(subset.metadata_file)
    else:
        described |= {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    return described


def _base_name(path: str) -> str:
    return SubsetSettings(place="", image_dir=path).folder_name


def _counts(dataset: Dataset, subset: SubsetSettings) -> dict[str, int]:
    return {"n_repeats": subset.num_repeats, "img_count": len(dataset.subset_items(subset))}


def _merged_tag_frequency(group: DatasetGroup) -> dict[str, dict[str, int]]:
    """A folder that several datasets use counts once."""
    merged: dict[str, dict[str, int]] = {}
    for dataset in group.datasets:
        for folder, counts in tag_frequency(dataset).items():
            merged.setdefault(folder, counts)
    return merged


def _dataset_dirs(group: DatasetGroup) -> dict[str, dict[str, int]]:
    """{folder: counts} without regularisation folders; a name that occurs again gets a number."""
    found: dict[str, dict[str, int]] = {}
    for dataset in group.datasets:
        for subset in dataset.settings.subsets:
            if subset.is_reg:
                continue
            name, number = subset.folder_name, 2
            while name in found:
                name, number = f"{subset.folder_name} ({number})", number + 1
            found[name] = _counts(dataset, subset)
    return found

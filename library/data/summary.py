"""What will be trained, as text, before anything heavy is loaded."""

from __future__ import annotations

from typing import Any

from library.data.captions import lacks_trigger_word
from library.data.dataset import Dataset, DatasetGroup
from library.data.settings import SubsetSettings


def summarize(group: DatasetGroup, title: str = "Training data", world_size: int = 1) -> str:
    """Lines about datasets, subsets, buckets and batches, and every note about files left out or unmatched."""
    images = len(group.items)
    lines = [f"{title}: {images} image{'s' if images != 1 else ''}, {group.sample_count} per epoch with repeats"]
    for number, dataset in enumerate(group.datasets, start=1):
        lines += [f"  {line}" for line in _dataset_lines(dataset, number)]
    per_process = " per process" if world_size > 1 else ""
    lines.append(f"  batches per epoch{per_process}: {group.batches_per_epoch(world_size)}")
    lines += [f"  {line}" for note in group.notes for line in note.split("\n")]
    return "\n".join(lines)


def _dataset_lines(dataset: Dataset, number: int) -> list[str]:
    settings = dataset.settings
    width, height = settings.resolution
    lines = [f"dataset {number}: {width}x{height}, batch size {settings.batch_size}"]
    if dataset.reg_image_count:
        lines[0] += f", {dataset.train_image_count} training and {dataset.reg_image_count} regularisation images"
    for subset in settings.subsets:
        count = len(dataset.subset_items(subset))
        if count:
            name = subset.metadata_file or subset.image_dir
            role = " (regularisation)" if subset.is_reg else ""
            lines.append(f"  {name}{role}: {count} images x {subset.num_repeats} repeats{_trigger(dataset, subset)}")
    if settings.enable_bucket:
        buckets = dataset.bucket_samples()
        counts = ", ".join(f"{size[0]}x{size[1]}: {len(samples)}" for size, samples in buckets.items())
        lines.append(f"  {len(buckets)} bucket{'s' if len(buckets) != 1 else ''}: {counts}")
    return lines


def _trigger(dataset: Dataset, subset: SubsetSettings) -> str:
    """What is done about the trigger word, if the subset has one."""
    rules, items = subset.captions, dataset.subset_items(subset)
    if not rules.trigger_word:
        return ""
    lacking = sum(lacks_trigger_word(item.caption, rules) for item in items)
    return f', trigger word "{rules.trigger_word}" put before {lacking} of {len(items)} captions'


def group_facts(group: DatasetGroup, title: str, world_size: int = 1) -> dict[str, Any]:
    """What ``summarize`` says, as JSON-able data for pages. Sizes are [width, height]."""
    return {
        "title": title,
        "images": len(group.items),
        "samples": group.sample_count,
        "batches": group.batches_per_epoch(world_size),
        "notes": list(group.notes),
        "datasets": [
            {
                "resolution": list(dataset.settings.resolution),
                "batch_size": dataset.settings.batch_size,
                "subsets": [
                    {
                        "name": subset.metadata_file or subset.image_dir,
                        "images": count,
                        "repeats": subset.num_repeats,
                        "regularisation": subset.is_reg,
                        "trigger": _trigger(dataset, subset),
                    }
                    for subset in dataset.settings.subsets
                    if (count := len(dataset.subset_items(subset)))
                ],
                "buckets": [
                    {"size": list(size), "samples": len(samples)} for size, samples in dataset.bucket_samples().items()
                ],
            }
            for dataset in group.datasets
        ],
    }

"""The contact sheet of ``--debug_dataset``: an HTML page with the images of every bucket as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data.batch import Batch
from library.data.captions import WILDCARD
from library.data.dataset import Dataset, DatasetGroup, Item
from library.data.order import BatchPlan
from library.data.summary import group_facts
from library.files import write_text
from library.html_pages import embedded_image, link_from, render_page

if TYPE_CHECKING:
    import numpy
    from PIL import Image

PER_BUCKET = 48
"""Most images of a bucket."""
ON_A_PAGE = 600
"""About the most images of a page; many buckets show fewer each, but at least ``LEAST``."""
LEAST = 6
LONGEST_SIDE = 384
"""Pixels of an image on the page."""


def write_contact_sheet(group: DatasetGroup, path: Path, *, seed: int, max_train_steps: int) -> int:
    """Write the page and return how many images it shows.

    Of each bucket the images come in the order of the first epoch, each image once; an image that varies (mirroring,
    random crops, shuffled captions and the like) comes again in the looks of its other repeats while there is room.
    Raises UserError for an image that cannot be read, OSError when the page cannot be written.
    """
    buckets = [
        _bucket(group, path, key, samples, seed=seed, max_train_steps=max_train_steps)
        for key, samples in sorted(_epoch(group, seed).items())
    ]
    name = path.name.removesuffix(".html").removesuffix(".dataset")
    data = {"name": name, "data": [group_facts(group, "Training data")], "buckets": buckets}
    write_text(path, render_page("contact_sheet.html", f"{name}: data set", data))
    return sum(len(bucket["cards"]) for bucket in buckets)


Sample = tuple[int, int]
"""A sample's id, and the number of its batch in the epoch."""
BucketKey = tuple[int, int, int]
"""Number of the dataset, width, height."""


def _epoch(group: DatasetGroup, seed: int) -> dict[BucketKey, list[Sample]]:
    """The samples of the first epoch, by bucket, in order."""
    found: dict[BucketKey, list[Sample]] = {}
    for number, plan in enumerate(group.plan(1, seed)):
        found.setdefault((plan.dataset, *plan.bucket), []).extend((sample, number) for sample in plan.samples)
    return found


def _bucket(
    group: DatasetGroup, page: Path, key: BucketKey, samples: list[Sample], *, seed: int, max_train_steps: int
) -> dict[str, Any]:
    number, width, height = key
    dataset = group.datasets[number]
    first_id = sum(len(before.samples) for before in group.datasets[:number])
    items = {sample: dataset.samples[sample - first_id] for sample, _ in samples}
    repeats = {item: dataset.repeats[item] for item in items.values()}
    buckets = sum(len(one.bucket_samples()) for one in group.datasets)
    limit = min(PER_BUCKET, max(LEAST, ON_A_PAGE // buckets))
    cards = []
    for sample, batch_number in _chosen(dataset, samples, items, limit):
        item = dataset.items[items[sample]]
        card = {"batch": batch_number, "repeats": repeats[items[sample]], "subset": item.subset.folder_name}
        if item.exists:
            plan = BatchPlan(number, (width, height), (sample,), 1)
            batch = group.load(plan, epoch=1, step=batch_number, max_train_steps=max_train_steps, seed=seed)
            card |= _seen(batch, dataset, item)
            card["link"] = link_from(page, item.path)
        else:
            card |= {"image": None, "note": "only its cache file is left", "caption": item.caption}
        cards.append({"name": item.path.name, **card})
    shown = len({items[sample] for sample, _ in _chosen(dataset, samples, items, limit)})
    return {
        "size": [width, height],
        "dataset": number + 1,
        "images": len(repeats),
        "samples": len(samples),
        "more": len(repeats) - shown,
        "cards": cards,
    }


def _chosen(dataset: Dataset, samples: list[Sample], items: dict[int, int], limit: int) -> list[Sample]:
    """Every image once, then the second looks of images that vary, and so on, up to ``limit``."""
    looks: dict[int, int] = {}
    ranked = []
    for place, sample in enumerate(samples):
        item = items[sample[0]]
        look = looks[item] = looks.get(item, -1) + 1
        if look == 0 or _varies(dataset.items[item]):
            ranked.append((look, place, sample))
    return [sample for _, _, sample in sorted(ranked)[:limit]]


def _varies(item: Item) -> bool:
    """Whether two samples of an image can differ."""
    subset, captions = item.subset, item.subset.captions
    pixels = subset.flip_aug or subset.augmentations or subset.face_crop_aug_range
    words = captions.changing_options() or (captions.enable_wildcard and _has_choices(item.caption))
    return bool(pixels or words)


def _has_choices(caption: str) -> bool:
    return "\n" in caption.strip() or WILDCARD.search(caption) is not None


def _seen(batch: Batch, dataset: Dataset, item: Item) -> dict[str, Any]:
    """What the model gets of a batch with one sample, and what it was made from."""
    image = None if batch.images is None else batch.images[0].numpy()
    note = ""
    if image is None:  # cached latents; their pixels are those of the fixed crop
        image = dataset.read_pixels(item, dataset.fixed_geometry(item), with_conditioning=False).image
        if batch.flipped[0]:
            image = image[:, :, ::-1]
        note = "from cached latents"
    extras = []
    if batch.alpha_masks is not None:
        extras.append(["alpha mask", _embedded(batch.alpha_masks[0].numpy()[None] * 2 - 1)])
    if batch.conditioning_images is not None:
        name = "loss mask" if dataset.settings.kind == "conditioning" else "control image"
        extras.append([name, _embedded(batch.conditioning_images[0].numpy())])
    height, width = batch.original_sizes[0]
    return {
        "image": _embedded(image),
        "size": [image.shape[2], image.shape[1]],
        "extras": extras,
        "note": note,
        "caption": batch.captions[0],
        "source": item.caption,
        "original": [width, height],
        "lost": _share_cut_off(dataset, item),
        "crop": list(batch.crop_top_lefts[0]),
        "weight": float(batch.loss_weights[0]),
        "multiplier": batch.network_multipliers[0],
        "mirrored": batch.flipped[0],
        "attributes": {name: str(value) for name, value in batch.custom_attributes[0].items()},
    }


def _share_cut_off(dataset: Dataset, item: Item) -> float | None:
    """The share of the resized image that the bucket's crop leaves out; None where images are cropped as they are."""
    if not dataset.settings.enable_bucket:
        return None
    (width, height), resized = item.placement.bucket, item.placement.resized
    return 1 - width * height / (resized[0] * resized[1])


def _embedded(pixels: numpy.ndarray) -> str:
    return embedded_image(to_image(pixels), LONGEST_SIDE)


def to_image(pixels: numpy.ndarray) -> Image.Image:
    """An image of pixels [1 or 3, height, width] in -1..1, as training has them."""
    import numpy
    from PIL import Image as images

    values = ((pixels + 1) * 127.5).round().clip(0, 255).astype(numpy.uint8)
    return images.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0).copy())

"""Datasets: images in buckets, and batches made from them.

Loading is a pure function of a batch plan, the epoch, the step and the seed: every random draw is named by them and by
the sample. torch is imported only when a batch is made.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.data.batch import Batch, stack_masks, stack_text
from library.data.buckets import Placement, crop_rectangle
from library.data.captions import make_caption
from library.data.order import BatchPlan, BucketSamples, batches_per_epoch, global_batches, plan_epoch
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.transforms import (
    Geometry,
    crop_offset,
    face_geometry,
    face_in_name,
    to_mask,
    to_pixels,
    vary_color,
    vary_tone,
)
from library.errors import UserError
from library.image_reading import read_image
from library.randomness import python_random

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

Size = tuple[int, int]


@dataclass
class CachedLatent:
    """What a latent cache knows of one image in one bucket; already mirrored if it was requested mirrored."""

    latents: Tensor
    """[C, h, w] float32."""
    original_size: Size
    crop: tuple[float, float, float, float]
    """Left, top, right, bottom (never mirrored)."""
    alpha_mask: Tensor | None = None
    """[H, W] float32."""


class LatentSource(Protocol):
    """Where the latents of one item come from."""

    def read(self, *, flipped: bool) -> CachedLatent:
        """The latents, those of the mirrored image if ``flipped``. Raises UserError for a file that cannot be read."""


class TextSource(Protocol):
    """Where the text encoder outputs of one item come from."""

    def read(self) -> dict[str, Tensor]:
        """The outputs by name, without a batch dimension. Raises UserError for a file that cannot be read."""


@dataclass
class Item:
    """One image in one dataset."""

    path: Path
    caption: str
    """As in the file or metadata."""
    tags: str
    size: Size
    """(width, height) of the file."""
    subset: SubsetSettings
    placement: Placement
    conditioning: Path | None = None
    exists: bool = True
    """False when only a cache file is left of the image."""
    latents: LatentSource | None = None
    text: TextSource | None = None

    @property
    def key(self) -> str:
        """The image's path, which is its name in batches and messages."""
        return str(self.path)


@dataclass(frozen=True)
class Frame:
    """What is known of an image's place in its bucket, apart from its pixels."""

    original_size: Size
    crop: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    alpha_mask: numpy.ndarray | None
    """float32 [H, W] in 0..1."""


@dataclass
class Pixels:
    """One image, ready to be trained or encoded."""

    image: numpy.ndarray
    """float32 [3, H, W] in -1..1."""
    conditioning: numpy.ndarray | None
    frame: Frame


class Dataset:
    """Items that share resolution, batch size and buckets; each occurs in an epoch as often as its repeats say.

    Items with no repeats (regularisation images beyond need) are known, but never used.
    """

    def __init__(self, settings: DatasetSettings, items: Sequence[Item], repeats: Sequence[int]) -> None:
        self.settings = settings
        self.items = list(items)
        self.repeats = list(repeats)
        self.samples = [index for index, count in enumerate(repeats) for _ in range(count)]
        """The item of each sample."""

    @property
    def used_items(self) -> list[Item]:
        """The items that occur in an epoch."""
        return [item for item, count in zip(self.items, self.repeats) if count]

    def subset_items(self, subset: SubsetSettings) -> list[Item]:
        """The items of one subset."""
        return [item for item in self.items if item.subset is subset]

    def bucket_samples(self) -> dict[Size, list[int]]:
        """Sample indices of every bucket in use, buckets sorted."""
        found: dict[Size, list[int]] = {}
        for sample, item in enumerate(self.samples):
            found.setdefault(self.items[item].placement.bucket, []).append(sample)
        return dict(sorted(found.items()))

    @property
    def train_image_count(self) -> int:
        """Images that are not regularisation images, with repeats."""
        return sum(count for item, count in zip(self.items, self.repeats) if not item.subset.is_reg)

    @property
    def reg_image_count(self) -> int:
        """Regularisation images on disk, with the configured repeats."""
        return sum(item.subset.num_repeats for item in self.items if item.subset.is_reg)

    def interpolation(self, item: Item) -> str:
        """The resize option that counts for ``item``."""
        return item.subset.resize_interpolation or self.settings.resize_interpolation or "bicubic"

    def loss_weight(self, item: Item) -> float:
        """1, or the prior loss weight for a regularisation image."""
        return self.settings.prior_loss_weight if item.subset.is_reg else 1.0

    def fixed_geometry(self, item: Item) -> Geometry:
        """The resize and centre crop that caching uses."""
        bucket, resized = item.placement.bucket, item.placement.resized
        return Geometry(resized, crop_offset(resized, bucket, None), bucket)

    def training_geometry(self, item: Item, rng: random.Random) -> Geometry:
        """The resize and crop of one access to an image that is not cached."""
        subset = item.subset
        if self.settings.enable_bucket:
            bucket, resized = item.placement.bucket, item.placement.resized
            offset = crop_offset(resized, bucket, rng if subset.random_crop else None)
            return Geometry(resized, offset, bucket)
        target = self.settings.resolution
        face = face_in_name(item.path.stem) if subset.face_crop_aug_range else None
        if face is not None and subset.face_crop_aug_range:
            crop = subset.random_crop
            return face_geometry(item.size, target, face, subset.face_crop_aug_range, random_crop=crop, rng=rng)
        return Geometry(item.size, crop_offset(item.size, target, rng if subset.random_crop else None), target)

    def read_pixels(
        self,
        item: Item,
        geometry: Geometry,
        *,
        color_rng: random.Random | None = None,
        tone_rng: random.Random | None = None,
        with_conditioning: bool = True,
    ) -> Pixels:
        """Decode, resize, crop, mirror and (given a random source) vary the colour and tone of one image.

        Raises UserError naming the file when it cannot be read.
        """
        image, alpha = read_image(item.path, alpha=item.subset.alpha_mask)
        if image.size != item.size:
            found, wanted = (f"{width}x{height}" for width, height in (image.size, item.size))
            raise UserError(
                f"{item.path}: has {found} pixels, expected {wanted}: changed, or described wrongly in metadata."
            )
        interpolation = self.interpolation(item)
        image = geometry.apply(image, interpolation)
        if color_rng is not None:
            image = vary_color(image, color_rng)
        if tone_rng is not None:
            image = vary_tone(image, item.subset.brightness_aug, item.subset.contrast_aug, tone_rng)
        conditioning = None
        if item.conditioning is not None and with_conditioning:
            conditioning = to_pixels(geometry.apply(read_image(item.conditioning)[0], interpolation))
        mask = None if alpha is None else to_mask(geometry.apply(alpha, interpolation))
        return Pixels(to_pixels(image), conditioning, self._frame(item, geometry, mask))

    def _frame(self, item: Item, geometry: Geometry, mask: numpy.ndarray | None) -> Frame:
        if self.settings.enable_bucket or geometry.resized == item.placement.resized:
            return Frame(item.size, crop_rectangle(geometry.size, item.size), mask)
        # A crop without resizing is trained as if it were the whole image.
        return Frame(geometry.size, (0, 0, *geometry.size), mask)


@dataclass
class _Sample:
    """One row of a batch before it is stacked."""

    item: Item
    item_id: int
    caption: str
    flipped: bool
    image: Tensor | None
    latents: Tensor | None
    alpha_mask: Tensor | None
    conditioning: Tensor | None
    text: dict[str, Tensor] | None
    original_size: Size
    crop: tuple[float, float, float, float]


class DatasetGroup:
    """All datasets of a run (or all its validation parts). Item ids count through the datasets in order."""

    def __init__(self, datasets: Sequence[Dataset], *, shuffle: bool = True, notes: Sequence[str] = ()) -> None:
        self.datasets = list(datasets)
        self.shuffle = shuffle
        self.notes = list(notes)
        """What the user should know: files left out, captions missing."""
        self._first_ids: list[int] = []
        total = 0
        for dataset in self.datasets:
            self._first_ids.append(total)
            total += len(dataset.samples)
        self.sample_count = total
        self._buckets = [
            BucketSamples(number, bucket, dataset.settings.batch_size, tuple(first + sample for sample in samples))
            for number, (dataset, first) in enumerate(zip(self.datasets, self._first_ids))
            for bucket, samples in dataset.bucket_samples().items()
        ]

    @property
    def items(self) -> list[Item]:
        """Every item that is used, of every dataset."""
        return [item for dataset in self.datasets for item in dataset.used_items]

    @property
    def trigger_words(self) -> list[str]:
        """The trigger words of subsets in use, each once."""
        words = [item.subset.captions.trigger_word for item in self.items]
        return list(dict.fromkeys(word for word in words if word))

    @property
    def train_image_count(self) -> int:
        """Images with repeats, without regularisation images (``ss_num_train_images``)."""
        return sum(dataset.train_image_count for dataset in self.datasets)

    @property
    def reg_image_count(self) -> int:
        """Regularisation images with repeats (``ss_num_reg_images``)."""
        return sum(dataset.reg_image_count for dataset in self.datasets)

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Batches of each process per epoch."""
        return batches_per_epoch([(len(entry.samples), entry.batch_size) for entry in self._buckets], world_size)

    def plan(self, epoch: int, seed: int, rank: int = 0, world_size: int = 1) -> list[BatchPlan]:
        """The batches of process ``rank`` in ``epoch``, in order."""
        return plan_epoch(self._buckets, epoch=epoch, seed=seed, rank=rank, world_size=world_size, shuffle=self.shuffle)

    def fingerprint(self) -> str:
        """A short hash of which samples there are; two runs with the same one have the same epochs."""
        digest = hashlib.blake2b(digest_size=16)
        for entry in self._buckets:
            digest.update(repr((entry.dataset, entry.bucket, entry.batch_size, entry.samples)).encode())
        self._digest_items(digest)
        return digest.hexdigest()

    def order_fingerprint(self, epoch: int, seed: int, world_size: int) -> str:
        """A short hash of the images of each batch of an epoch, over all processes together.

        Equal for other numbers of processes and batch sizes whose batches are the same images in the same order.
        """
        digest = hashlib.blake2b(digest_size=16)
        groups = global_batches(self._buckets, epoch=epoch, seed=seed, world_size=world_size, shuffle=self.shuffle)
        for group in groups:
            digest.update(repr([sample for part in group for sample in part.samples]).encode())
        self._digest_items(digest)
        return digest.hexdigest()

    def _digest_items(self, digest: Any) -> None:
        for dataset in self.datasets:
            for item, count in zip(dataset.items, dataset.repeats):
                digest.update(repr((item.path.name, item.size, count)).encode())

    def load(self, plan: BatchPlan, *, epoch: int, step: int, max_train_steps: int, seed: int) -> Batch:
        """Make the batch of ``plan``.

        ``epoch`` counts from 1 (0: no epoch, for validation), ``step`` is the number of updates done. Images come from
        the latent cache where items have one. Raises UserError naming a file that cannot be read.
        """
        samples = [
            self._load_sample(plan.dataset, item_id, epoch=epoch, step=step, max_train_steps=max_train_steps, seed=seed)
            for item_id in plan.samples
        ]
        return self._collate(plan, samples)

    def _load_sample(
        self, number: int, item_id: int, *, epoch: int, step: int, max_train_steps: int, seed: int
    ) -> _Sample:
        dataset = self.datasets[number]
        item = dataset.items[dataset.samples[item_id - self._first_ids[number]]]
        rng = python_random(seed, "caption", epoch, item_id)
        caption = make_caption(
            item.caption, item.subset.captions, rng=rng, epoch=epoch, step=step, max_train_steps=max_train_steps
        )
        flip_rng = python_random(seed, "flip", epoch, item_id)
        flipped = item.subset.flip_aug and flip_rng.random() < 0.5
        if item.latents is not None:
            sample = _cached_sample(dataset, item, item_id, caption, flipped)
        else:
            rng = python_random(seed, "augmentation", epoch, item_id)
            tone_rng = python_random(seed, "rotation and tone", epoch, item_id)
            sample = _decoded_sample(dataset, item, item_id, caption, flipped, rng, tone_rng)
        if item.text is not None:
            sample.text = item.text.read()
        return sample

    def _collate(self, plan: BatchPlan, samples: list[_Sample]) -> Batch:
        import torch

        dataset = self.datasets[plan.dataset]
        images = [sample.image for sample in samples if sample.image is not None]
        latents = [sample.latents for sample in samples if sample.latents is not None]
        conditioning = [sample.conditioning for sample in samples if sample.conditioning is not None]
        texts = [sample.text for sample in samples if sample.text is not None]
        weights = [0.0 if plan.padding else dataset.loss_weight(sample.item) for sample in samples]
        width, height = plan.bucket
        return Batch(
            item_ids=[sample.item_id for sample in samples],
            image_keys=[sample.item.key for sample in samples],
            captions=[sample.caption for sample in samples],
            images=torch.stack(images) if images else None,
            latents=torch.stack(latents) if latents else None,
            text=stack_text(texts) if texts else None,
            alpha_masks=stack_masks([sample.alpha_mask for sample in samples]),
            conditioning_images=torch.stack(conditioning) if conditioning else None,
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            group_size=plan.group_size,
            original_sizes=[(sample.original_size[1], sample.original_size[0]) for sample in samples],
            crop_top_lefts=[_crop_top_left(sample, width) for sample in samples],
            target_sizes=[(height, width)] * len(samples),
            flipped=[sample.flipped for sample in samples],
            network_multipliers=torch.full((len(samples),), dataset.settings.network_multiplier).tolist(),
            custom_attributes=[sample.item.subset.custom_attributes for sample in samples],
        )


def _cached_sample(dataset: Dataset, item: Item, item_id: int, caption: str, flipped: bool) -> _Sample:
    assert item.latents is not None
    cached = item.latents.read(flipped=flipped)
    mask = cached.alpha_mask if item.subset.alpha_mask else None
    conditioning = None
    if item.conditioning is not None:
        import torch

        geometry = _mirrored(dataset.fixed_geometry(item), flipped)
        image = geometry.apply(read_image(item.conditioning)[0], dataset.interpolation(item))
        conditioning = torch.from_numpy(to_pixels(image))
    return _Sample(
        item=item,
        item_id=item_id,
        caption=caption,
        flipped=flipped,
        image=None,
        latents=cached.latents,
        alpha_mask=mask.flip(1) if mask is not None and flipped else mask,
        conditioning=conditioning,
        text=None,
        original_size=cached.original_size,
        crop=cached.crop,
    )


def _decoded_sample(
    dataset: Dataset,
    item: Item,
    item_id: int,
    caption: str,
    flipped: bool,
    rng: random.Random,
    tone_rng: random.Random,
) -> _Sample:
    import torch

    subset = item.subset
    angle = tone_rng.uniform(-subset.rotate_aug, subset.rotate_aug)
    geometry = replace(_mirrored(dataset.training_geometry(item, rng), flipped), angle=angle)
    toned = subset.brightness_aug or subset.contrast_aug
    pixels = dataset.read_pixels(
        item, geometry, color_rng=rng if subset.color_aug else None, tone_rng=tone_rng if toned else None
    )
    mask, conditioning = pixels.frame.alpha_mask, pixels.conditioning
    return _Sample(
        item=item,
        item_id=item_id,
        caption=caption,
        flipped=flipped,
        image=torch.from_numpy(pixels.image),
        latents=None,
        alpha_mask=None if mask is None else torch.from_numpy(mask),
        conditioning=None if conditioning is None else torch.from_numpy(conditioning),
        text=None,
        original_size=pixels.frame.original_size,
        crop=pixels.frame.crop,
    )


def _mirrored(geometry: Geometry, flipped: bool) -> Geometry:
    return Geometry(geometry.resized, geometry.offset, geometry.size, flipped)


def _crop_top_left(sample: _Sample, width: int) -> tuple[float, float]:
    left, top, right, _ = sample.crop
    return (top, width - right) if sample.flipped else (top, left)

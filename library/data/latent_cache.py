"""Cached latents: every image encoded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from library.data import npz
from library.data.cache_base import Cache
from library.data.cache_entries import (
    IDENTITY,
    CacheReport,
    Entry,
    FolderShares,
    State,
    cache_stem,
    in_batches,
    require_finite_arrays,
    require_images,
)
from library.data.dataset import CachedLatent, Dataset, DatasetGroup, Frame, Item, Pixels
from library.data.loader import prefetch
from library.errors import NotFiniteError, UserError
from library.randomness import generator

if TYPE_CHECKING:
    from torch import Generator, Tensor

    EncodeImages = Callable[[Tensor, list[Generator]], Tensor]


@dataclass(frozen=True)
class LatentFormat:
    """How a family's latents are stored: ``<image stem>_<width>x<height><suffix>``, 4 digits each."""

    suffix: str
    stride: int = 8
    """Pixels per latent."""
    channels: int | None = None
    """Latent channels; None: any."""
    sized_keys: bool = True
    """Array names end in ``_{rows}x{columns}``, so that one file holds several resolutions."""
    plain_name: bool = False
    """An existing ``<image stem>.npz`` is used before the name with sizes (Stable Diffusion's old files)."""


def check_latents_cacheable(group: DatasetGroup) -> None:
    """Raises UserError when an augmentation gives images more than one set of latents."""
    for dataset in group.datasets:
        for subset in dataset.settings.subsets:
            for option in subset.augmentations:
                raise UserError(f"{subset.place}: {option} cannot be used together with cached latents.")


class LatentCache(Cache):
    """The latents of every image of a group.

    Made with the group, it looks at what is on disk; ``fill`` makes the rest; from then on ``group.load`` gives
    latents. ``identity`` names the encoder: entries made with another one are stale. Raises UserError for settings
    that cannot be cached and for images that would share a cache file.
    """

    subject = "latent cache"
    progress = ("caching latents", "image")
    attribute = "latents"

    def __init__(
        self,
        group: DatasetGroup,
        format: LatentFormat,
        *,
        to_disk: bool,
        skip_check: bool = False,
        identity: str = "",
        rank: int = 0,
        world_size: int = 1,
        shares: FolderShares | None = None,
    ) -> None:
        check_latents_cacheable(group)
        self.format = format
        self._dataset_of = {id(item): dataset for dataset in group.datasets for item in dataset.used_items}
        wanted = [
            (*self._place(dataset, item, to_disk), self._signature(dataset, item))
            for dataset in group.datasets
            for item in dataset.used_items
        ]
        super().__init__(
            wanted,
            to_disk=to_disk,
            skip_check=skip_check,
            identity=identity,
            rank=rank,
            world_size=world_size,
            shares=shares,
        )
        require_images(self.todo)

    @property
    def missing_bytes(self) -> int | None:
        """About the size of the latents that this process must make; None when their channels are not known ahead."""
        if self.format.channels is None:
            return None
        pixels = sum(_area(entry.item) * (1 + _flips(entry)) for entry in self.todo)
        return pixels * self.format.channels * 4 // self.format.stride**2

    def fill(self, encode: EncodeImages, *, batch_size: int = 1, seed: int = 0, workers: int = 8) -> CacheReport:
        """Encode what is missing.

        ``encode`` takes pixels [B, 3, H, W] (float32 in -1..1, one bucket) and a generator for each image, and gives
        latents [B, C, h, w]. Generators come from the seed, the image's name and the mirroring alone. Raises UserError
        when an image cannot be read, latents are not finite, or a file cannot be written.
        """
        import torch

        # The largest first, so that too little memory shows at once.
        todo = sorted(self.todo, key=lambda entry: (-_area(entry.item), entry.item.placement.bucket))
        batches = list(in_batches(todo, batch_size, lambda entry: (entry.item.placement.bucket, _flips(entry))))
        workers = max(1, min(workers, os.cpu_count() or 1, len(batches)))
        with ThreadPoolExecutor(workers) as decoders, self._filling(len(todo)) as (writers, bar, report):
            for batch, pixels in prefetch(decoders, self._decode, batches, workers + 1):
                images = torch.stack([torch.from_numpy(entry.image) for entry in pixels])
                plain = encode(images, _generators(batch, seed, flipped=False))
                mirrored = None
                if _flips(batch[0]):
                    mirrored = encode(images.flip(3), _generators(batch, seed, flipped=True))
                writers.submit(self._store, batch, [entry.frame for entry in pixels], plain, mirrored)
                bar.update(len(batch))
        return report

    def _place(self, dataset: Dataset, item: Item, to_disk: bool) -> tuple[Any, Item, str | None]:
        """The entry's key, and its file."""
        if not to_disk:
            return self._signature(dataset, item), item, None
        path = self._path(item)
        return (path, self._key(item)), item, path

    def _path(self, item: Item) -> str:
        stem = cache_stem(item)
        if self.format.plain_name and os.path.exists(plain := f"{stem}.npz"):
            return plain
        return f"{stem}_{item.size[0]:04d}x{item.size[1]:04d}{self.format.suffix}"

    def _key(self, item: Item) -> str:
        """What the names of this resolution's arrays end in."""
        if not self.format.sized_keys:
            return ""
        width, height = item.placement.bucket
        return f"_{height // self.format.stride}x{width // self.format.stride}"

    def _signature(self, dataset: Dataset, item: Item) -> tuple[Any, ...]:
        return (item.path, item.placement.bucket, item.placement.resized, dataset.interpolation(item))

    def _explain_conflict(self, entry: Entry, item: Item) -> str:
        if entry.item.path != item.path:
            return (
                f"{entry.item.path} and {item.path.name} would share one latent cache file; rename one of them, or "
                "cache in memory (--cache_latents without --cache_latents_to_disk)."
            )
        return (
            f"{item.path}: two datasets resize this image differently for the same bucket, which one cache file cannot "
            "hold; give them the same options, or cache in memory."
        )

    def _on_disk(self, entry: Entry) -> DiskLatents:
        return DiskLatents(self, entry)

    def _key_suffix(self, entry: Entry) -> str:
        return self._key(entry.item)

    def _made_arrays(self, entry: Entry) -> list[str]:
        key = self._key(entry.item)
        return [f"latents{key}"] + ([f"latents_flipped{key}"] if _flips(entry) else [])

    def _unfit(self, entry: Entry, heads: Mapping[str, npz.ArrayHead]) -> State | None:
        key = self._key(entry.item)
        if any(name not in heads for name in (*self._made_arrays(entry), f"original_size{key}", f"crop_ltrb{key}")):
            return "missing"
        if not self._shapes_fit(heads, entry):
            return "stale"
        masked = any(item.subset.alpha_mask for item in entry.items)
        return "missing" if masked and f"alpha_mask{key}" not in heads else None

    def _is_current(self, entry: Entry, written: dict[str, Any], sums: Mapping[str, int]) -> bool:
        item, arrays = entry.item, written["arrays"]
        expected = self._identity(item, image=None) | {"image": written.get("image"), "arrays": arrays}
        if written != expected or any(arrays.get(name) != value for name, value in sums.items()):
            return False
        return not item.exists or _same_file(item.path, written["image"])

    def _shapes_fit(self, heads: Mapping[str, npz.ArrayHead], entry: Entry) -> bool:
        wanted = self.shapes(entry)
        return all(heads[name].fits(wanted[name]) for name in wanted if name in heads)

    def shapes(self, entry: Entry) -> dict[str, npz.Shape]:
        """The shapes of the arrays that an entry's items use, by name."""
        key = self._key(entry.item)
        width, height = entry.item.placement.bucket
        latents = (self.format.channels, height // self.format.stride, width // self.format.stride)
        shapes: dict[str, npz.Shape] = {name: latents for name in self._made_arrays(entry)}
        shapes |= {f"original_size{key}": (2,), f"crop_ltrb{key}": (4,)}
        if any(item.subset.alpha_mask for item in entry.items):
            shapes[f"alpha_mask{key}"] = (height, width)
        return shapes

    def _identity(self, item: Item, image: dict[str, Any] | None) -> dict[str, Any]:
        """What an entry is made from, as it is written into the file."""
        interpolation = self._dataset_of[id(item)].interpolation(item)
        return {
            "version": 1,
            "encoder": self.identity,
            "resized": list(item.placement.resized),
            "interpolation": interpolation,
            "image": image,
        }

    def _decode(self, batch: list[Entry]) -> list[Pixels]:
        decoded = []
        for entry in batch:
            # Every item of an entry has the same pixels; one that asks for the alpha mask gives it to all.
            item = next((item for item in entry.items if item.subset.alpha_mask), entry.item)
            dataset = self._dataset_of[id(item)]
            decoded.append(dataset.read_pixels(item, dataset.fixed_geometry(item), with_conditioning=False))
        return decoded

    def _store(self, batch: list[Entry], frames: list[Frame], plain: Tensor, mirrored: Tensor | None) -> None:
        plain = plain.detach().float().cpu()
        mirrored = None if mirrored is None else mirrored.detach().float().cpu()
        for row, (entry, frame) in enumerate(zip(batch, frames)):
            latents = [plain[row]] + ([] if mirrored is None else [mirrored[row]])
            if not all(bool(tensor.isfinite().all()) for tensor in latents):
                raise NotFiniteError(
                    f"{entry.item.path}: the autoencoder gave values that are not finite (NaN or infinity); "
                    "run it in float32 (--no_half_vae)."
                )
            if entry.path is None:
                self._attach(entry, MemoryLatents([tensor.clone() for tensor in latents], frame))
            else:
                self._write_latents(entry, frame, [tensor.numpy() for tensor in latents])
            entry.state = "valid"

    def _write_latents(self, entry: Entry, frame: Frame, latents: Sequence[numpy.ndarray]) -> None:
        key = self._key(entry.item)
        arrays = {
            f"latents{key}": latents[0],
            f"original_size{key}": numpy.array(frame.original_size),
            f"crop_ltrb{key}": numpy.array(frame.crop),
        }
        if len(latents) == 2:
            arrays[f"latents_flipped{key}"] = latents[1]
        if frame.alpha_mask is not None:
            arrays[f"alpha_mask{key}"] = frame.alpha_mask
        # What this resolution held before (a mask no longer wanted, latents of a changed image) does not stay.
        old = {f"{name}{key}" for name in ("latents_flipped", "alpha_mask")}
        identity = self._identity(entry.item, _describe_file(entry.item.path))
        self._write(entry, arrays, identity, keep=lambda name: name not in old)


class MemoryLatents:
    """Latents kept in memory: plain, and mirrored when flip_aug is on."""

    def __init__(self, latents: list[Tensor], frame: Frame) -> None:
        import torch

        self.latents, self.frame = latents, frame
        self.alpha_mask = None if frame.alpha_mask is None else torch.from_numpy(frame.alpha_mask)

    def read(self, *, flipped: bool) -> CachedLatent:
        """The latents, mirrored if requested."""
        return CachedLatent(self.latents[int(flipped)], self.frame.original_size, self.frame.crop, self.alpha_mask)


class DiskLatents:
    """Latents read from a cache file each time."""

    def __init__(self, cache: LatentCache, entry: Entry) -> None:
        self.cache, self.entry = cache, entry

    def read(self, *, flipped: bool) -> CachedLatent:
        """The latents, mirrored if requested. Raises UserError naming the file."""
        import torch

        path, key = self.entry.path, self.cache._key(self.entry.item)
        assert path is not None
        latents, others = f"latents{key}", f"latents_flipped{key}"
        if flipped:
            latents, others = others, latents
        shapes = self.cache.shapes(self.entry)
        wanted = {name: shapes[name] for name in shapes if name != others}
        arrays = npz.read_arrays_for_training(path, wanted, f"{IDENTITY}{key}", self.cache.is_ours)
        require_finite_arrays(path, arrays)
        width, height = (int(side) for side in arrays[f"original_size{key}"])
        left, top, right, bottom = (float(edge) for edge in arrays[f"crop_ltrb{key}"])
        mask = arrays.get(f"alpha_mask{key}")
        return CachedLatent(
            latents=torch.from_numpy(arrays[latents]).float(),
            original_size=(width, height),
            crop=(left, top, right, bottom),
            alpha_mask=None if mask is None else torch.from_numpy(mask).float(),
        )


def _area(item: Item) -> int:
    return item.placement.bucket[0] * item.placement.bucket[1]


def _flips(entry: Entry) -> bool:
    return any(item.subset.flip_aug for item in entry.items)


def _generators(batch: Sequence[Entry], seed: int, *, flipped: bool) -> list[Generator]:
    """One generator per image, which knows nothing of the batch."""
    names = [f"{entry.item.path.parent.name}/{entry.item.path.name}" for entry in batch]
    return [generator(seed, "latent", name, int(flipped)) for name in names]


def _describe_file(path: Path) -> dict[str, Any]:
    """Size, time and content hash of an image file."""
    status = path.stat()
    return {"bytes": status.st_size, "time": status.st_mtime_ns, "blake2b": _content_hash(path)}


def _same_file(path: Path, described: Any) -> bool:
    """Whether the file still is the described one; its content is only read when its time differs (a copy)."""
    if not isinstance(described, dict):
        return False
    status = path.stat()
    if status.st_size != described.get("bytes"):
        return False
    return status.st_mtime_ns == described.get("time") or _content_hash(path) == described.get("blake2b")


def _content_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

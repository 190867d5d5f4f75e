"""How a run caches what its frozen parts give: common to latents and text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from library.console import size_text, warn
from library.data.options import CacheOptions, TextCacheOptions
from library.files import free_bytes
from library.training.data import TrainingData
from library.training.distribution import shares_of_folders


@dataclass(frozen=True)
class Caching:
    """One kind of cache."""

    format: Any
    """The family's ``LatentFormat`` or ``TextFormat``."""
    identity: str
    """Text that changes with whatever the cached values depend on, but for the item itself."""
    to_disk: bool
    skip_check: bool
    batch_size: int
    """Items that are encoded together."""

    def open(self, cache_class: Any, data: TrainingData, accelerator: Any) -> list[Any]:
        """The caches of training and validation data, looked through but not yet filled."""
        return [
            cache_class(
                group,
                self.format,
                to_disk=self.to_disk,
                skip_check=self.skip_check,
                identity=self.identity,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                shares=partial(shares_of_folders, accelerator),
            )
            for group in data.groups
        ]


def caches_text(options: TextCacheOptions) -> bool:
    """Whether captions are encoded ahead."""
    return options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk


def latent_caching(options: CacheOptions, format: Callable[[], Any], identity: Callable[[], str]) -> Caching | None:
    """How latents are cached, if requested."""
    if not (options.cache_latents or options.cache_latents_to_disk):
        return None
    return Caching(
        format(),
        identity(),
        to_disk=options.cache_latents_to_disk,
        skip_check=options.skip_cache_check,
        batch_size=options.vae_batch_size,
    )


def text_caching(
    options: TextCacheOptions,
    common: CacheOptions,
    data: TrainingData,
    format: Callable[[], Any],
    identity: Callable[[], str],
) -> Caching | None:
    """How text encoder outputs are cached, if requested."""
    if not caches_text(options):
        return None
    return Caching(
        format(),
        identity(),
        to_disk=options.cache_text_encoder_outputs_to_disk,
        skip_check=common.skip_cache_check,
        batch_size=options.text_encoder_batch_size or data.train.datasets[0].settings.batch_size,
    )


def warn_of_full_disk(caches: Iterable[Any], processes: int) -> None:
    """Warn when the disk of the images has less room than the entries that ``processes`` will write beside them."""
    for cache in caches:
        path = next((entry.path for entry in cache.todo if entry.path is not None), None)
        if path is None or not cache.missing_bytes:
            continue
        needed, free = cache.missing_bytes * processes, free_bytes(path.parent)
        if needed > free:
            warn(
                f"{cache.subject}: about {size_text(needed)} will be written beside the images, but {size_text(free)} "
                f"are free on the disk of {path.parent}, {size_text(needed - free)} are missing."
            )

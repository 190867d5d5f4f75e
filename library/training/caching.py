"""How a run caches what its frozen parts give: common to latents and text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from library.data.options import CacheOptions, TextCacheOptions
from library.training.data import TrainingData


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

"""From images to clean latents: encoded ahead once, or at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from library.console import warn
from library.devices import to_device
from library.training.caching import Caching, warn_of_full_disk

if TYPE_CHECKING:
    from torch import Tensor

    from library.data.batch import Batch
    from library.data.cache import CacheReport, LatentCache
    from library.models.pipeline import Pipeline
    from library.training.data import TrainingData
    from library.training.distribution import LoadInTurn
    from library.training.objective.step_inputs import ItemDraws


class Latents:
    """The latents of a run's images; ``caching`` None: every image goes through the autoencoder at each step."""

    def __init__(self, pipeline: Pipeline, data: TrainingData, accelerator: Any, caching: Caching | None) -> None:
        self.pipeline, self.data, self.accelerator = pipeline, data, accelerator
        self.caching = caching

    def open_caches(self) -> list[LatentCache]:
        """The caches, looked through but not yet filled; none if not requested."""
        if self.caching is None:
            return []
        from library.data.cache import LatentCache

        return self.caching.open(LatentCache, self.data, self.accelerator)

    def fill_caches(self, load_in_turn: LoadInTurn) -> list[CacheReport]:
        """Encode every image ahead, if requested; the autoencoder is loaded only when an entry is missing."""
        if self.caching is None:
            return []
        caches = self.open_caches()
        warn_of_full_disk(caches, self.accelerator.num_processes)
        with load_in_turn():
            if any(cache.missing for cache in caches):
                self.pipeline.load_autoencoder()
        size, seed = self.caching.batch_size, self.data.seed
        with self.pipeline.blaming_files("autoencoder"):
            reports = [cache.fill(self.encode, batch_size=size, seed=seed) for cache in caches]
        self.accelerator.wait_for_everyone()
        self.pipeline.release("autoencoder")
        return reports

    def encode(self, pixels: Tensor, generators: Sequence[Any]) -> Tensor:
        """Latents of pixels [batch, 3, height, width] in -1..1."""
        return self.pipeline.encode_images(to_device(pixels, self.accelerator.device), generators)

    def of(self, batch: Batch, draws: ItemDraws) -> Tensor:
        """The batch's latents on the device, float32, from the cache or from the autoencoder."""
        import torch

        if batch.latents is not None:
            return batch.latents.to(self.accelerator.device, torch.float32, non_blocking=True)
        assert batch.images is not None
        with self.pipeline.blaming_files("autoencoder"):
            latents = self.encode(batch.images, draws.generators("latents"))
        if not torch.isfinite(latents).all():
            self.pipeline.require_finite_files("autoencoder")
            warn("The autoencoder gave NaN latents, which were replaced by 0; try --no_half_vae.")
            latents = latents.nan_to_num(0.0, 0.0, 0.0)
        return latents

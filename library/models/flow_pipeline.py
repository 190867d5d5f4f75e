"""What the pipelines of flow models share that use FLUX.1's autoencoder: images, latents, and where parts are found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.models.loading import TensorSource
from library.models.pipeline import Pipeline, Request
from library.randomness import seeded_generator


class FlowPipeline(Pipeline[Request]):
    """A transformer that predicts the velocity of latents of FLUX.1's autoencoder."""

    @property
    def latent_stride(self) -> int:
        """Pixels per latent position; an image's sides must be multiples of twice that."""
        return self.files.autoencoder.config.stride if self.files.autoencoder else 8

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Latents [B, 16, H/8, W/8], float32 and scaled, of ``pixels`` [B, 3, H, W] in -1..1.

        Item i is drawn from its posterior by the CPU generator ``generators[i]``; None takes the posterior's mean.
        """
        with self._without_autocast():
            return self.load_autoencoder().encode(pixels, generators)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in -1..1, of ``latents`` [B, 16, H/8, W/8]."""
        with self._without_autocast():
            return self.load_autoencoder().decode(latents).float().clamp(-1, 1)

    def _without_autocast(self) -> torch.autocast:
        """An autoencoder that is kept in float32 must also compute in it."""
        return torch.autocast(self.device.type, enabled=False)

    def image_size(self, request: Request) -> tuple[int, int]:
        """Height and width, rounded up to whole tokens of 2 x 2 latent positions."""
        step = 2 * self.latent_stride
        return -(-request.height // step) * step, -(-request.width // step) * step

    def image_tokens(self, request: Request) -> int:
        """How many tokens the transformer sees of an image."""
        height, width = self.image_size(request)
        return (height // (2 * self.latent_stride)) * (width // (2 * self.latent_stride))

    def generator(self, request: Request) -> torch.Generator:
        """On the device: so that a seed gives the image that users of kohya-ss/sd-scripts know."""
        return seeded_generator(request.seed, self.device)


def part_path(
    transformer: Path | str,
    opened: TensorSource,
    given: Path | str | None,
    *,
    option: str,
    name: str,
    subfolder: str,
    prefixes: tuple[str, ...],
) -> Path | str:
    """Where a part is: as ``given``, else in the ``transformer``'s own model folder or all-in-one file.

    ``opened``: the transformer's tensors. Raises UserError, naming ``option``, when there is none.
    """
    if given:
        return given
    if (Path(transformer) / subfolder).is_dir() or any(key.startswith(prefixes) for key in opened.checkpoint):
        return transformer
    raise UserError(f"{option} is missing: it names the {name} file that belongs to the transformer.")


def require_width(transformer: Any, source: TensorSource, width: int, wanted: int) -> None:
    """Raises UserError unless a part gives the transformer as many channels as it takes.

    ``transformer``: its opened file; ``source``: the part's tensors; ``width``: what the part gives.
    """
    if width != wanted:
        raise UserError(
            f"{source.checkpoint.label} gives {width} channels, but the transformer "
            f"{transformer.source.checkpoint.path} takes {wanted}: they don't belong together."
        )

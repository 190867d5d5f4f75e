"""What the pipelines of flow models share: images, latents, streaming, and where parts are found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.errors import UserError
from library.memory.stream_choice import BlockSizes
from library.models.autoencoder_parts import all_finite, overflow_advice, visible
from library.models.loading import TensorSource
from library.models.pipeline import Pipeline, Request
from library.randomness import seeded_generator


class FlowPipeline(Pipeline[Request]):
    """A transformer that predicts the velocity of an autoencoder's latents."""

    token_side: ClassVar[int] = 2
    """Latent positions along a side of what is one token of the transformer."""

    @property
    def latent_stride(self) -> int:
        """Pixels per latent position; an image's sides must be multiples of ``token_side`` times that."""
        return self.files.autoencoder.config.stride if self.files.autoencoder else 8

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Latents [B, C, h, w], float32 as caches keep them, of ``pixels`` [B, 3, H, W] in -1..1.

        Item i is drawn from its posterior by the CPU generator ``generators[i]``; None takes the posterior's mean.
        """
        with self._without_autocast():
            return self.load_autoencoder().encode(pixels, generators)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in -1..1, of ``latents`` [B, C, h, w].

        NaN values become black, with a warning. Raises UserError where a damaged file is the reason.
        """
        autoencoder = self.load_autoencoder()
        with self._without_autocast():
            pixels = autoencoder.decode(latents).float()
        if not all_finite(pixels):
            self.require_finite_files(*(["autoencoder"] if all_finite(latents) else self.parts))
        advice = overflow_advice(autoencoder.dtype, "run it in bfloat16 or float32")
        return visible(pixels, latents, "the transformer", advice)

    def _without_autocast(self) -> torch.autocast:
        """An autoencoder that is kept in float32 must also compute in it."""
        return torch.autocast(self.device.type, enabled=False)

    def image_size(self, request: Request) -> tuple[int, int]:
        """Height and width, rounded up to whole tokens."""
        step = self.token_side * self.latent_stride
        return -(-request.height // step) * step, -(-request.width // step) * step

    def image_tokens(self, request: Request) -> int:
        """How many tokens the transformer sees of an image."""
        step = self.token_side * self.latent_stride
        height, width = self.image_size(request)
        return (height // step) * (width // step)

    def generator(self, request: Request) -> torch.Generator:
        """On the device: so that a seed gives the image that users of kohya-ss/sd-scripts know."""
        return seeded_generator(request.seed, self.device)


class DoubleSinglePipeline(FlowPipeline[Request]):
    """A transformer of double blocks (text and image apart), then single blocks (both as one sequence)."""

    block_list_names = ("double_blocks", "single_blocks")

    def most_to_swap(self, sizes: BlockSizes) -> int:
        """Until one of the two lists is used up."""
        double, single = (len(sizes[name]) for name in self.block_list_names)
        return min(2 * double + 1, single // 2 * 2)

    def swapped_bytes(self, count: int, sizes: BlockSizes) -> int:
        """Half of ``count`` are double blocks, and for each other one two single blocks."""
        double, single = (sizes[name] for name in self.block_list_names)
        return sum(double[: count // 2]) + sum(single[: 2 * (count - count // 2)])


def part_path(
    transformer: Path | str,
    opened: TensorSource | None,
    given: Path | str | None,
    *,
    option: str,
    name: str,
    subfolder: str,
    prefixes: tuple[str, ...] = (),
) -> Path | str:
    """Where a part is: as ``given``, else in the ``transformer``'s own model folder or all-in-one file.

    ``opened``: the tensors of an all-in-one file, where the part's have one of the ``prefixes``. Raises UserError,
    naming ``option``, when there is none.
    """
    if given:
        return given
    keys = opened.checkpoint if opened else ()
    if (Path(transformer) / subfolder).is_dir() or any(key.startswith(prefixes) for key in keys):
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

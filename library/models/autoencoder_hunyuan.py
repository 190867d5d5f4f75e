"""HunyuanImage-2.1's image autoencoder, under the names of the original checkpoint.

Pixels in -1..1 become 64 channels at 1/32 of the size. Each change of resolution folds pixels into channels or back,
beside a shortcut that does so with its input. The published file is float16 and is computed in it; in float32 it takes
twice the memory, and bfloat16 keeps three bits fewer of each value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.errors import UserError
from library.models.autoencoder_parts import (
    DIFFUSERS_BLOCKS,
    Autoencoder,
    InStrips,
    Level,
    Middle,
    convolve,
    layers_of,
    norm_groups,
    renamed,
)
from library.models.loading import Origin, TensorSource, on_meta
from library.models.pipeline import OpenedPart
from library.models.recognition import AUTOENCODER_PREFIXES, refuse_unless

LATENT_SCALE = 0.75289
"""What the transformer's latents are of the autoencoder's."""


@dataclass(frozen=True)
class HunyuanAutoencoderConfig:
    """Everything that fixes the network's shape; the defaults are the published autoencoder."""

    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    """Channels of each level, from the full resolution down."""
    res_blocks: int = 2
    """In each level of the encoder; the decoder's have one more."""
    latent_channels: int = 64
    groups: int = 32

    @property
    def stride(self) -> int:
        """Pixels per latent position."""
        return 2 ** (len(self.widths) - 1)


# ---- resolutions ----------------------------------------------------------------------------------------------------


def space_to_depth(x: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, 4C, h, w]; the channels are in the order (row, column, channel)."""
    batch, channels, height, width = x.shape
    folded = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return folded.reshape(batch, 4 * channels, height // 2, width // 2)


def depth_to_space(x: Tensor) -> Tensor:
    """[B, 4C, h, w] -> [B, C, 2h, 2w], the way back of ``space_to_depth``."""
    batch, channels, height, width = x.shape
    unfolded = x.reshape(batch, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
    return unfolded.reshape(batch, channels // 4, 2 * height, 2 * width)


def add_group_means(values: Tensor, x: Tensor) -> Tensor:
    """``values`` [B, c, h, w] + the means of ``x`` [B, n * c, h, w] over n channels that follow each other."""
    return values + x.unflatten(1, (values.shape[1], -1)).mean(2)


def add_repeated(values: Tensor, x: Tensor) -> Tensor:
    """``values`` [B, n * c, h, w] + each channel of ``x`` [B, c, h, w] n times after each other."""
    return values + x.repeat_interleave(values.shape[1] // x.shape[1], dim=1)


class Downsample(InStrips):
    """Half the size, [B, in, 2h, 2w] -> [B, out, h, w]: squares of 2 x 2 become channels, convolved and averaged."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = None if self.strip_rows is None else self.strip_rows + self.strip_rows % 2
        return convolve(self.conv, x, rows, beside=x, join=self._fold)

    def _fold(self, values: Tensor, x: Tensor) -> Tensor:
        return add_group_means(space_to_depth(values), space_to_depth(x))


class Upsample(InStrips):
    """Twice the size, [B, in, h, w] -> [B, out, 2h, 2w]: channels become squares of 2 x 2, convolved and repeated."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, x, self.strip_rows, beside=x, join=self._unfold)

    def _unfold(self, values: Tensor, x: Tensor) -> Tensor:
        return depth_to_space(add_repeated(values, x))


# ---- the network ----------------------------------------------------------------------------------------------------


class Encoder(InStrips):
    """Pixels [B, 3, H, W] -> moments [B, 2 * latent channels, H / stride, W / stride]."""

    def __init__(self, config: HunyuanAutoencoderConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Level(width, width, config.res_blocks, config.groups) for width in widths)
        for level, width, narrower in zip(self.down, widths, widths[1:]):
            level.downsample = Downsample(width, narrower)
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = convolve(self.conv_in, x, self.strip_rows)
        for layer in layers_of(self.down):
            x = layer(x)
        x = self.mid(x)
        return convolve(self.conv_out, x, self.strip_rows, self.norm_out, x, add_group_means)


class Decoder(InStrips):
    """Unscaled latents -> pixels [B, 3, H, W]."""

    def __init__(self, config: HunyuanAutoencoderConfig):
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = Middle(widths[0], config.groups)
        # up[0] is the coarsest level, which runs first
        self.up = nn.ModuleList(Level(width, width, config.res_blocks + 1, config.groups) for width in widths)
        for level, width, wider in zip(self.up, widths, widths[1:]):
            level.upsample = Upsample(width, wider)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(convolve(self.conv_in, x, self.strip_rows, beside=x, join=add_repeated))
        for layer in layers_of(self.up):
            x = layer(x)
        return convolve(self.conv_out, x, self.strip_rows, self.norm_out)


class HunyuanAutoencoder(Autoencoder):
    """Encoder and decoder; the state dict has the keys of the original checkpoint.

    It computes in its weights' dtype. Where float16 overflows, its results are not finite: nothing hides that.
    """

    def __init__(self, config: HunyuanAutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.tile: tuple[int, int] | None = None
        """Size and overlap of tiles, in latent positions."""

    def set_chunk_size(self, rows: int | None) -> None:
        """Work through maps in horizontal strips of ``rows`` rows, for less memory; None: each map at once.

        The result is the same up to rounding. Norms and attention are computed in strips too. Nothing is differentiated
        then. Raises ValueError unless ``rows`` is positive.
        """
        if rows is not None and rows < 1:
            raise ValueError(f"a strip has at least one row, not {rows}")
        for module in self.modules():
            if isinstance(module, InStrips):
                module.strip_rows = rows

    def set_tile_size(self, pixels: int | None, overlap: float = 0.25) -> None:
        """Encode and decode images in square tiles of ``pixels``, for images that are too large otherwise; None: whole.

        Neighbours share at least ``overlap`` of their sides, where they cross-fade. Norms and attention see one tile at
        a time, so that the result is another than the whole image's. Raises ValueError unless ``pixels`` are whole
        latent positions and ``overlap`` is 0..0.5.
        """
        if pixels is None:
            self.tile = None
            return
        size, rest = divmod(pixels, self.config.stride)
        if size < 1 or rest or not 0 <= overlap <= 0.5:
            raise ValueError(
                f"a tile's side is a multiple of {self.config.stride} pixels and its overlap 0..0.5, not {pixels} and "
                f"{overlap}"
            )
        self.tile = size, int(size * overlap)

    def moments(self, images: Tensor) -> Tensor:
        """[batch, 2z, H/32, W/32] of ``images``: means and log-variances."""
        return (
            self.encoder(images)
            if self.tile is None
            else in_tiles(self.encoder, images, self.config.stride, 1, *self.tile)
        )

    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """As ``encode_unscaled``: the transformer's latents are ``LATENT_SCALE`` of these."""
        return self.encode_unscaled(images, generators)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [batch, 3, H, W], about -1..1, in the weights' dtype, of unscaled ``latents`` [batch, z, h, w]."""
        latents = latents.to(device=self.device, dtype=self.dtype)
        return (
            self.decoder(latents)
            if self.tile is None
            else in_tiles(self.decoder, latents, 1, self.config.stride, *self.tile)
        )


# ---- tiles ----------------------------------------------------------------------------------------------------------


def tile_starts(size: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """(start, what it shares with the tile before it) of equally spread tiles that overlap by ``overlap`` or more."""
    count = max(1, -(-(size - overlap) // (tile - overlap)))
    end = 0
    for index in range(count):
        start = index * (size - tile) // max(count - 1, 1)
        yield start, max(end - start, 0)
        end = start + tile


def in_tiles(layer: Callable[[Tensor], Tensor], x: Tensor, x_step: int, step: int, tile: int, overlap: int) -> Tensor:
    """``layer(x)`` computed in square tiles that cross-fade linearly where they overlap, [B, C, H, W].

    ``tile`` and ``overlap``: positions, each of ``x_step`` rows and columns of ``x`` and of ``step`` of the result.
    What all tiles agree on is kept to the bit.
    """
    height, width = (size // x_step for size in x.shape[2:])
    whole = None
    for top, shared_above in tile_starts(height, tile, overlap):
        band = None
        for left, shared in tile_starts(width, tile, overlap):
            rows, columns = (slice(start * x_step, (start + tile) * x_step) for start in (top, left))
            piece = layer(x[:, :, rows, columns])
            if band is None:
                band = piece.new_empty(*piece.shape[:3], width * step)
            _cross_fade(band, piece, left * step, shared * step, 3)
        assert band is not None
        if whole is None:
            whole = band.new_empty(*band.shape[:2], height * step, band.shape[3])
        _cross_fade(whole, band, top * step, shared_above * step, 2)
    assert whole is not None
    return whole


def _cross_fade(whole: Tensor, piece: Tensor, start: int, shared: int, dim: int) -> None:
    """Write ``piece`` into ``whole`` from ``start`` on; its first ``shared`` values fade in over what is there."""
    if shared:
        weights = (torch.arange(shared, dtype=torch.float32, device=whole.device) + 0.5) / shared
        weights = weights.to(whole.dtype).reshape(-1, *(1,) * (3 - dim))
        whole.narrow(dim, start, shared).lerp_(piece.narrow(dim, 0, shared), weights)
    own = piece.shape[dim] - shared
    whole.narrow(dim, start + shared, own).copy_(piece.narrow(dim, shared, own))


# ---- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HunyuanAutoencoderFile(OpenedPart[HunyuanAutoencoder]):
    """An opened autoencoder checkpoint, ready to be loaded."""

    source: TensorSource
    config: HunyuanAutoencoderConfig

    def meta_module(self) -> HunyuanAutoencoder:
        """The module on torch's meta device: its structure without its values."""
        with on_meta():
            return HunyuanAutoencoder(self.config)


def open_hunyuan_autoencoder(path: Path | str, disable_mmap: bool = False, option: str = "") -> HunyuanAutoencoderFile:
    """Open ``path`` (original or Diffusers layout; a file, or a model folder with ``vae/``) by its headers only.

    Raises UserError, naming ``option`` and what the file is, when it isn't such an autoencoder.
    """
    checkpoint = open_checkpoint(path, "vae", disable_mmap, option)
    kinds = {"hunyuan-vae", "hunyuan-vae-diffusers"}
    kind = refuse_unless(checkpoint, kinds, "HunyuanImage-2.1's autoencoder (VAE)", AUTOENCODER_PREFIXES)
    source = TensorSource(checkpoint, AUTOENCODER_PREFIXES)
    if kind.name == "hunyuan-vae-diffusers":
        blocks = _blocks_before_downsample(source)
        source.remap({original_name(name, blocks): Origin((name,)) for name in source.names()})
    source.remap({name: origin for name in source.names() if (origin := _flat_kernel(source, name))})
    levels = source.count(r"encoder\.down\.(\d+)\.")
    widths = tuple(source.sizes(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels))
    config = HunyuanAutoencoderConfig(
        widths=widths,
        res_blocks=source.count(r"encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=source.sizes("decoder.conv_in.weight", 4)[1],
        groups=norm_groups(source, widths),
    )
    _require_shortcuts(source, config)
    return HunyuanAutoencoderFile(source, config)


def _require_shortcuts(source: TensorSource, config: HunyuanAutoencoderConfig) -> None:
    """Raises UserError where channels cannot be averaged or repeated from one width to the next."""
    steps = zip(config.widths, config.widths[1:])
    fits = all(other % 4 == 0 and 4 * width % other == 0 for width, other in steps)
    if not fits or config.widths[-1] % (2 * config.latent_channels):
        raise UserError(
            f"{source.checkpoint.label}: its levels have {', '.join(map(str, config.widths))} channels and its latents "
            f"{config.latent_channels}, which no shortcuts can connect; the file is damaged or of another kind."
        )


def _flat_kernel(source: TensorSource, name: str) -> Origin | None:
    """A kernel of three dimensions of which the first has one entry, as two-dimensional ones; None for all others."""
    shape = source.shape(name)
    is_flat = len(shape) == 5 and shape[2] == 1
    return Origin((name,), shape=(*shape[:2], *shape[3:])) if is_flat else None


# ---- Diffusers' names -----------------------------------------------------------------------------------------------


DIFFUSERS_NAMES = (*DIFFUSERS_BLOCKS, (r"\battn_1\.proj\.", "attn_1.proj_out."))
FLATTENED = re.compile(r"(?P<side>down|up)_blocks\.(?P<index>\d+)\.")


def _blocks_before_downsample(source: TensorSource) -> int:
    """The residual blocks of each of the encoder's levels, in Diffusers' single list of them and the downsamplers."""
    count = source.count(r"encoder\.down_blocks\.(\d+)\.")
    return next((index for index in range(count) if f"encoder.down_blocks.{index}.conv.weight" in source), count)


def original_name(name: str, blocks: int) -> str:
    """The original name of a Diffusers tensor, where each of the encoder's levels has that many residual blocks."""

    def level(match: re.Match[str]) -> str:
        count = blocks if match["side"] == "down" else blocks + 1
        index, place = divmod(int(match["index"]), count + 1)
        part = f"{match['side']}sample" if place == count else f"block.{place}"
        return f"{match['side']}.{index}.{part}."

    return renamed(FLATTENED.sub(level, name, count=1), DIFFUSERS_NAMES)

"""The image autoencoder of FLUX.1 and Lumina Image 2.0, under the names of the original checkpoints.

Pixels in -1..1 become latents at 1/8 of the size (with four resolution levels), scaled to about unit variance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.checkpoints import open_checkpoint
from library.models.autoencoder_parts import DIFFUSERS_BLOCKS, Autoencoder, Level, Middle, norm_groups, renamed
from library.models.loading import Origin, TensorSource, on_meta
from library.models.pipeline import OpenedPart
from library.models.recognition import AUTOENCODER_PREFIXES, refuse_unless

LATENT_SCALE = 0.3611
LATENT_SHIFT = 0.1159


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that fixes the network's shape; the defaults are the FLUX.1 autoencoder."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 16
    groups: int = 32

    @property
    def stride(self) -> int:
        """Pixels per latent position."""
        return 2 ** (len(self.multipliers) - 1)


class Downsample(nn.Module):
    """Half the size: a strided convolution padded at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] -> moments [B, 2 * latent channels, H / stride, W / stride]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level(([config.channels, *widths])[index], width, config.res_blocks, config.groups)
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Unscaled latents -> pixels [B, 3, H, W]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList()  # up[0] is the finest level, as in the checkpoints; forward runs from the last to it
        for index, width in enumerate(widths):
            level = Level(([*widths, widths[-1]])[index + 1], width, config.res_blocks + 1, config.groups)
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(Autoencoder):
    """Encoder and decoder; the state dict has the keys of the original checkpoints."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Scaled latents of ``images`` [batch, 3, H, W] in -1..1: float32 [batch, z, H/8, W/8].

        Item i is sampled from its posterior with the CPU generator ``generators[i]``, so that it does not depend on its
        batch; without generators the posterior's mean is taken.
        """
        return LATENT_SCALE * (self.encode_unscaled(images, generators) - LATENT_SHIFT)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [batch, 3, H, W], about -1..1, of scaled ``latents`` [batch, z, H/8, W/8]."""
        unscaled = latents.float() / LATENT_SCALE + LATENT_SHIFT
        return self.decoder(unscaled.to(device=self.device, dtype=self.dtype))


@dataclass(frozen=True)
class AutoencoderFile(OpenedPart[AutoencoderKL]):
    """An opened autoencoder checkpoint, ready to be loaded."""

    source: TensorSource
    config: AutoencoderConfig

    def meta_module(self) -> AutoencoderKL:
        """The module on torch's meta device: its structure without its values."""
        with on_meta():
            return AutoencoderKL(self.config)


def open_autoencoder(path: Path | str, disable_mmap: bool = False, option: str = "") -> AutoencoderFile:
    """Open ``path`` (original or Diffusers layout; a file, or a model folder with ``vae/``) by its headers only.

    Raises UserError, naming ``option`` and what the file is, when it isn't such an autoencoder.
    """
    checkpoint = open_checkpoint(path, "vae", disable_mmap, option)
    kind = refuse_unless(checkpoint, {"ae", "ae-diffusers"}, "a FLUX autoencoder (AE)", AUTOENCODER_PREFIXES)
    source = TensorSource(checkpoint, AUTOENCODER_PREFIXES)
    if kind.name == "ae-diffusers":
        levels = source.count(r"decoder\.up_blocks\.(\d+)\.")
        source.remap({original_name(name, levels): diffusers_origin(source, name) for name in source.names()})
    channels = source.sizes("encoder.conv_in.weight", 4)[0]
    levels = source.count(r"encoder\.down\.(\d+)\.")
    widths = [source.sizes(f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    config = AutoencoderConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=source.count(r"encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=source.sizes("decoder.conv_in.weight", 4)[1],
        groups=norm_groups(source, widths),
    )
    return AutoencoderFile(source, config)


DIFFUSERS_NAMES = (
    (r"\bdown_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"\bdown_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"\bup_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"\bup_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    *DIFFUSERS_BLOCKS,
    (r"\bgroup_norm\.", "norm."),
    (r"\bquery\.", "q."),
    (r"\bkey\.", "k."),
    (r"\bvalue\.", "v."),
    (r"\b(to_out\.0|proj_attn)\.", "proj_out."),
    (r"\bconv_norm_out\.", "norm_out."),
)


def original_name(name: str, levels: int) -> str:
    """The original name of a Diffusers tensor; Diffusers counts the decoder's levels from the coarsest."""
    name = renamed(name, DIFFUSERS_NAMES)
    return re.sub(r"\bup\.(\d+)\.", lambda match: f"up.{levels - 1 - int(match[1])}.", name)


def diffusers_origin(source: TensorSource, name: str) -> Origin:
    """The attention's projections are matrices in Diffusers, 1x1 convolutions in the original."""
    shape = source.shape(name)
    return Origin((name,), shape=(*shape, 1, 1) if len(shape) == 2 else None)

"""What the image autoencoders share: residual blocks, attention, posteriors; and strips, which need less memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.console import warn
from library.errors import UserError
from library.models.loading import TensorSource

NORM_GROUPS = 32
"""Of every GroupNorm in the published autoencoders and U-Nets, whatever their width."""


def norm_groups(source: TensorSource, widths: Sequence[int]) -> int:
    """The groups of a model's GroupNorms: ``norm_num_groups`` of its configuration, else the published models' 32.

    Raises UserError when one of ``widths``, the channels of its levels, cannot be split into that many.
    """
    groups = source.exceptions.get("norm_num_groups", NORM_GROUPS)
    if not isinstance(groups, int) or groups < 1:
        raise UserError(
            f'{source.checkpoint.label}: "norm_num_groups" in its configuration must be a positive integer.'
        )
    for width in widths:
        if width % groups:
            raise UserError(
                f"{source.checkpoint.label}: {width} channels cannot be split into {groups} norm groups; a model that "
                'was made with another number says so as "norm_num_groups" in the "config" entry of its metadata.'
            )
    return groups


# ---- strips ---------------------------------------------------------------------------------------------------------


class InStrips(nn.Module):
    """A layer that can work through its map in horizontal strips, which gives the same values in less memory."""

    strip_rows: int | None = None
    """Rows of the map at a time; None, and maps that have no more, are computed at once."""


Join = Callable[[Tensor, Tensor], Tensor]
"""What becomes of a convolution's values and the rows of another map beside them."""


def convolve(
    conv: nn.Conv2d,
    x: Tensor,
    rows: int | None,
    norm: nn.GroupNorm | None = None,
    beside: Tensor | None = None,
    join: Join | None = None,
    overwrite: bool = False,
) -> Tensor:
    """``conv``, of stride 1 and padded to keep the size, of ``x`` [B, C, h, w], ``rows`` rows at a time.

    ``norm``: ``x`` goes through it and SiLU first. ``join``, with ``beside``, a map of the size of ``x``, makes the
    result of the convolution's values. In strips, nothing is differentiated, and memory holds the two maps, the result
    and a strip; with ``overwrite`` the result takes the place of ``beside``.
    """
    if rows is not None and x.shape[2] > rows:
        return _convolve_in_strips(conv, x, rows, norm, beside, join, overwrite)
    result = conv(x if norm is None else F.silu(norm(x)))
    return result if join is None or beside is None else join(result, beside)


@torch.no_grad()
def _convolve_in_strips(
    conv: nn.Conv2d,
    x: Tensor,
    rows: int,
    norm: nn.GroupNorm | None,
    beside: Tensor | None,
    join: Join | None,
    overwrite: bool,
) -> Tensor:
    height, reach = x.shape[2], conv.kernel_size[0] // 2
    activate = None if norm is None else _activation(norm, x)
    result = beside if overwrite else None
    filled = 0
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        top, bottom = max(start - reach, 0), min(stop + reach, height)
        window = x[:, :, top:bottom]
        if activate is not None:
            window = activate(window)
        border = reach - (start - top), reach - (bottom - stop)  # rows of zeros above the map and below it
        if any(border):
            window = F.pad(window, (0, 0, *border))
        strip = F.conv2d(window, conv.weight, conv.bias, padding=(0, reach))
        if join is not None and beside is not None:
            strip = join(strip, beside[:, :, start:stop])
        if result is None:
            total = height * strip.shape[2] // (stop - start)
            result = strip.new_empty(*strip.shape[:2], total, strip.shape[3])
        result[:, :, filled : filled + strip.shape[2]] = strip
        filled += strip.shape[2]
    assert result is not None
    return result


def _activation(norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
    """SiLU of the group norm of ``x``, as a function of any rows of ``x``; both are computed in float32."""
    groups = x.reshape(len(x), norm.num_groups, -1).split(1, dim=1)
    spread = [torch.var_mean(group.float(), 2, correction=0) for group in groups]  # not all of x in float32 at once
    variance, mean = (torch.cat(values, dim=1) for values in zip(*spread))
    deviation = (variance + norm.eps).sqrt()
    of_channel = [value.repeat_interleave(x.shape[1] // norm.num_groups, dim=1) for value in (mean, deviation)]
    scale = norm.weight.float() / of_channel[1]
    shift = norm.bias.float() - of_channel[0] * scale

    def activate(part: Tensor) -> Tensor:
        normed = torch.addcmul(shift[:, :, None, None], part.float(), scale[:, :, None, None])
        return F.silu(normed, inplace=True).to(x.dtype)

    return activate


# ---- blocks ---------------------------------------------------------------------------------------------------------


class ResnetBlock(InStrips):
    """Two normed convolutions around a shortcut, [B, in, h, w] -> [B, out, h, w].

    In strips, the result takes the place of its input where they have the same size.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_channels = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        hidden = convolve(self.conv1, x, self.strip_rows, self.norm1)
        return convolve(
            self.conv2, hidden, self.strip_rows, self.norm2, x, self._add_shortcut, not self.changes_channels
        )

    def _add_shortcut(self, hidden: Tensor, x: Tensor) -> Tensor:
        return (self.nin_shortcut(x) if self.changes_channels else x) + hidden


class AttnBlock(InStrips):
    """One-head attention over all positions; in strips, the queries of a strip look at all keys."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            layer(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for layer in (self.q, self.k, self.v)
        )
        if self.strip_rows is None or x.shape[2] <= self.strip_rows:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            strips = query.split(self.strip_rows * x.shape[3], dim=2)
            attended = torch.cat([F.scaled_dot_product_attention(strip, key, value) for strip in strips], dim=2)
        return x + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """Residual block, attention, residual block, at the smallest size."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution (the checkpoints call their list ``block``) and the step to the next resolution."""

    def __init__(self, in_channels: int, out_channels: int, count: int, groups: int):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if index == 0 else out_channels, out_channels, groups) for index in range(count)
        )
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def layers(self) -> Iterator[nn.Module]:
        """In the order in which they run."""
        yield from self.block
        resample = self.downsample or self.upsample
        if resample is not None:
            yield resample

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


def layers_of(levels: nn.ModuleList) -> Iterator[nn.Module]:
    """The layers of all levels, to be run one by one: a level that runs its own keeps its input meanwhile."""
    for level in levels:
        assert isinstance(level, Level)
        yield from level.layers()


# ---- names ----------------------------------------------------------------------------------------------------------


DIFFUSERS_BLOCKS = (
    (r"\bmid_block\.resnets\.0\.", "mid.block_1."),
    (r"\bmid_block\.resnets\.1\.", "mid.block_2."),
    (r"\bmid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\bto_q\.", "q."),
    (r"\bto_k\.", "k."),
    (r"\bto_v\.", "v."),
    (r"\bconv_shortcut\.", "nin_shortcut."),
)
"""Diffusers' names inside the blocks, as patterns, and the original ones."""


def renamed(name: str, names: Sequence[tuple[str, str]]) -> str:
    """``name`` after each pattern of ``names`` in turn."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


# ---- posteriors -----------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """An ``encoder`` of pixels to the moments of normal distributions and a ``decoder``, both in the weights' dtype."""

    encoder: nn.Module
    decoder: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def moments(self, images: Tensor) -> Tensor:
        """[batch, 2z, h, w] of ``images`` in the weights' dtype, on their device."""
        return self.encoder(images)

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the unscaled latents of ``images`` [batch, 3, H, W] in -1..1.

        Each is float32 [batch, z, H/stride, W/stride]. The log-variance is clamped to -30..20, as in diffusers.
        """
        moments = self.moments(images.to(device=self.device, dtype=self.dtype)).float()
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode_unscaled(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Unscaled latents of ``images`` [batch, 3, H, W] in -1..1: float32 [batch, z, H/stride, W/stride].

        Item i is sampled from its posterior with the CPU generator ``generators[i]``, so that it does not depend on its
        batch; without generators the posterior's mean is taken.
        """
        mean, logvar = self.encode_moments(images)
        if generators is not None:
            if len(generators) != len(mean):
                raise ValueError(f"{len(generators)} generators for {len(mean)} images")
            noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
            mean = mean + torch.exp(0.5 * logvar) * noise.to(mean.device)
        return mean


# ---- values that are not finite -------------------------------------------------------------------------------------


def all_finite(values: Tensor) -> bool:
    """Whether all values are numbers; yes, too, for a tensor without values, as a dry run has it."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(values, FakeTensor) or bool(values.isfinite().all())


def overflow_advice(dtype: torch.dtype, remedy: str) -> str:
    """What helps where an autoencoder that computes in ``dtype`` gives NaN; ``remedy`` if it is float16."""
    if dtype == torch.float16:
        return f"in float16 its values overflow: {remedy}"
    return f"its weights may be damaged (it runs in {str(dtype).removeprefix('torch.')})"


def visible(pixels: Tensor, latents: Tensor, denoiser: str, advice: str) -> Tensor:
    """``pixels`` of ``latents`` within -1..1. What is not finite becomes black, with a warning that says why."""
    if not all_finite(pixels):
        if all_finite(latents):
            warn(f"An image is black where the autoencoder gives NaN; {advice}.")
        else:
            warn(f"An image is black: {denoiser} gave NaN latents.")
    return pixels.nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0).clamp(-1, 1)

"""diffusers' ``AutoencoderKL`` in slices of an image's height: the same values in less memory.

Convolutions, with the norm and the activation before them, work through their maps slice by slice, each with the rows
beside it that the kernel reaches; norms are of the whole map, and so is attention. (diffusers' own tiles are blended
images of parts, which are others than the whole.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.autoencoder_parts import convolve


@contextlib.contextmanager
def in_slices(autoencoder: Any, slices: int | None, height: int) -> Iterator[None]:
    """While it is active, ``autoencoder`` works through images ``height`` pixels high in that many ``slices``.

    A slice has the same number of rows on every level, so that there are fewer of them on smaller maps. None, and 1,
    change nothing. Nothing can be differentiated meanwhile.
    """
    rows = height if slices is None else -(-height // slices)
    if rows >= height:
        yield
        return
    changed = list(_sliced(autoencoder, rows))
    try:
        for module, forward in changed:
            module.forward = forward
        yield
    finally:
        for module, _ in changed:
            module.__dict__.pop("forward", None)


def _sliced(autoencoder: Any, rows: int) -> Iterator[tuple[Any, Callable[..., Tensor]]]:
    """The modules that work in slices, and their forward that does."""
    for half in (autoencoder.encoder, autoencoder.decoder):
        yield half.conv_in, partial(_convolved, half.conv_in, None, rows)
        yield half.conv_norm_out, _unchanged
        yield half.conv_act, _unchanged
        yield half.conv_out, partial(_convolved, half.conv_out, half.conv_norm_out, rows)
        for module in half.modules():
            if type(module).__name__ in FORWARDS:
                yield module, partial(FORWARDS[type(module).__name__], module, rows)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _convolved(conv: nn.Conv2d, norm: nn.GroupNorm | None, rows: int, x: Tensor) -> Tensor:
    """A convolution after, if there is one, a norm and its activation; their own forwards are not the classes' now."""
    if x.shape[2] > rows:
        return convolve(conv, x, rows, norm)
    return type(conv).forward(conv, x if norm is None else F.silu(type(norm).forward(norm, x)))


def _residual(block: Any, rows: int, x: Tensor, temb: None = None) -> Tensor:
    """Two normed convolutions around a shortcut; the result takes the place of ``x`` where it has its size."""
    shortcut: nn.Conv2d | None = block.conv_shortcut

    def add(hidden: Tensor, beside: Tensor) -> Tensor:
        return (beside if shortcut is None else shortcut(beside)) + hidden

    hidden = convolve(block.conv1, x, rows, block.norm1)
    return convolve(block.conv2, hidden, rows, block.norm2, x, add, overwrite=shortcut is None)


def _upsampled(block: Any, rows: int, x: Tensor, output_size: None = None) -> Tensor:
    """Twice the size: a slice of the nearest neighbours and the rows beside it is made of half as many rows."""
    height = 2 * x.shape[2]
    if height <= rows:
        return block.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    parts = []
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        first, last = max(start - 1, 0) // 2, (min(stop + 1, height) + 1) // 2
        window = F.interpolate(x[:, :, first:last], scale_factor=2.0, mode="nearest")
        window = window[:, :, max(start - 1, 0) - 2 * first : min(stop + 1, height) - 2 * first]
        window = F.pad(window, (0, 0, int(start == 0), int(stop == height)))
        parts.append(F.conv2d(window, block.conv.weight, block.conv.bias, padding=(0, 1)))
    return torch.cat(parts, dim=2)


def _downsampled(block: Any, rows: int, x: Tensor) -> Tensor:
    """Half the size: a strided convolution, padded at the right and at the bottom only."""
    height = x.shape[2] // 2
    if height <= rows:
        return block.conv(F.pad(x, (0, 1, 0, 1)))
    parts = []
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        window = x[:, :, 2 * start : 2 * stop + 1]
        parts.append(block.conv(F.pad(window, (0, 1, 0, 2 * (stop - start) + 1 - window.shape[2]))))
    return torch.cat(parts, dim=2)


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "ResnetBlock2D": _residual,
    "Upsample2D": _upsampled,
    "Downsample2D": _downsampled,
}
"""What diffusers' modules do in slices, by their class's name."""

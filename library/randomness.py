"""Every random draw is derived from (seed, purpose, keys).

A draw that is named by what it is for (noise of item 17 in epoch 3) does not depend on what was drawn before it. So the
number of loader workers, sample images, validation and resuming change nothing, and ranks draw different noise because
they hold different items.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch

Key = int | str


def derive_seed(seed: int, purpose: str, *keys: Key) -> int:
    """A 63-bit seed for one draw; the same arguments give the same seed on every machine and Python version."""
    text = "\x1f".join([str(seed), purpose, *(f"{type(key).__name__}:{key}" for key in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *keys: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for one draw. Draw on the CPU and move: so that every device sees the same numbers."""
    import torch

    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *keys))


def python_random(seed: int, purpose: str, *keys: Key) -> random.Random:
    """A ``random.Random`` for one draw (captions, augmentation)."""
    return random.Random(derive_seed(seed, purpose, *keys))


def numpy_random(seed: int, purpose: str, *keys: Key) -> numpy.random.Generator:
    """A NumPy generator for one draw."""
    import numpy

    return numpy.random.default_rng(derive_seed(seed, purpose, *keys))


def seed_global_torch(seed: int, purpose: str, *keys: Key) -> None:
    """Seed torch's global generators (all devices), for draws inside modules such as dropout."""
    import torch

    derived = derive_seed(seed, purpose, *keys)
    if torch.accelerator.is_available():
        torch.manual_seed(derived)
    else:  # torch would write down where it was called from, for each kind of device that could appear later
        torch.default_generator.manual_seed(derived)


def seeded_generator(seed: int | None, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one image, seeded as in other programs; ``seed`` None: another image each time."""
    import torch

    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def draw_noise(
    item_shape: Sequence[int], generators: Sequence[torch.Generator], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Standard normal noise, [batch, *item_shape] in ``dtype`` (float32), an item from each generator on its device."""
    import torch

    shape = tuple(item_shape)
    return torch.stack([torch.randn(shape, generator=g, device=g.device, dtype=dtype) for g in generators])


def pyramid_layers(shape: tuple[int, ...], count: int, discount: float, generator: torch.Generator) -> torch.Tensor:
    """Noise of coarser and coarser grids for one item, [c, h, w] = ``shape`` on the generator's device.

    Layer i has the sides ``side / r^i``, r from 2..4 for each layer, is enlarged bilinearly and weighted by the power i
    of ``discount``; the first layer is of full size. After a layer with a side of 1 no more follow.
    """
    import torch

    channels, height, width = shape
    device = generator.device
    total = torch.zeros(1, *shape, device=device)
    ratios = random.Random(generator.initial_seed())  # Python's, since a dry run's tensors have no values
    for index in range(count):
        ratio = ratios.uniform(2, 4)
        rows, columns = (max(1, int(side / ratio**index)) for side in (height, width))
        layer = torch.randn(1, channels, rows, columns, generator=generator, device=device)
        total += discount**index * torch.nn.functional.interpolate(layer, size=(height, width), mode="bilinear")
        if rows == 1 or columns == 1:
            break
    return total[0]
